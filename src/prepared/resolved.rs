//! The types of a statement's parameters, as a server made them out: a `Parse` that spells them out needs no question whether
//! they are still the same, and the server casts where a table has other ones by now, as it does for a statement that it keeps.

use std::cell::RefCell;

use super::Described;

/// The longest list of types: as many as the count's two bytes can tell; bytes.
const TYPES_MAX: usize = 2 + 4 * 65535;

/// What servers last said of one statement's parameters.
#[derive(Debug, Default)]
pub struct Resolved {
    known: RefCell<Option<Types>>,
    /// The most bytes that there may be of types.
    most: usize,
}

#[derive(Clone, Debug)]
struct Types {
    /// How clients are told of them.
    described: Described,
    /// As in the `Parse` message; none if these are the types that clients give.
    inferred: Option<Box<[u8]>>,
}

impl Resolved {
    /// Nothing yet, of a statement with this text, for which clients give these types.
    pub(super) fn of(text: &[u8], given: &[u8]) -> Self {
        // Whatever is not given has its `$` in the text.
        let most = given.len() + 4 * memchr::memchr_iter(b'$', text).count();
        Self { known: RefCell::default(), most: most.min(TYPES_MAX) }
    }

    /// Bytes that it may take besides itself: what is learned later changes nothing.
    pub(super) const fn room(&self) -> usize {
        self.most
    }

    /// A server described the parameters: `body` is a `ParameterDescription`'s, which is like the types in a `Parse`. `given` are
    /// those that clients give.
    ///
    /// Source: `PostgreSQL` 17 docs, §54.7 "`ParameterDescription` (B)", "Parse (F)".
    pub(super) fn learn(&self, described: Described, body: &[u8], given: &[u8]) {
        let mut known = self.known.borrow_mut();
        if known.as_ref().is_some_and(|known| known.described == described) {
            return;
        }
        let fits = body.len() <= self.most;
        let is_whole = body.split_first_chunk().is_some_and(|(count, types)| {
            let count: &[u8; 2] = count;
            types.len() == 4 * usize::from(u16::from_be_bytes(*count))
        });
        let inferred = (body != given).then(|| body.into());
        *known = (fits && is_whole).then_some(Types { described, inferred });
    }

    /// What was learned of a statement with the same text.
    pub fn learn_from(&self, other: &Self) {
        if self.known.borrow().is_none() {
            let theirs = other.known.borrow().clone();
            *self.known.borrow_mut() = theirs;
        }
    }

    /// What is known may not hold any more.
    pub(super) fn forget(&self) {
        *self.known.borrow_mut() = None;
    }

    /// Whether a `Parse` with the types that are known makes it all that is `wanted`: these parameters.
    #[must_use]
    pub fn makes(&self, wanted: Described) -> bool {
        wanted.is_of_parameters() && self.known.borrow().as_ref().is_some_and(|known| known.described == wanted)
    }

    /// How a statement is described, as far as that is certain in advance, that is parsed with the types that are known, if it is
    /// `spelled`, or with those that clients give; and whether that makes a difference.
    pub fn certain(&self, spelled: bool) -> (Described, bool) {
        match &*self.known.borrow() {
            Some(Types { described, inferred }) if spelled || inferred.is_none() => (*described, inferred.is_some()),
            _ => (Described::default(), false),
        }
    }

    pub(super) fn with_types<T>(&self, given: &[u8], with: impl FnOnce(&[u8]) -> T) -> T {
        let known = self.known.borrow();
        with(known.as_ref().and_then(|known| known.inferred.as_deref()).unwrap_or(given))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: &[u8] = b"\0\0";
    const INT4: &[u8] = b"\0\x01\0\0\0\x17";
    const INT8: &[u8] = b"\0\x01\0\0\0\x14";

    #[test]
    fn types_are_spelled_out_as_they_were_described_last() {
        let resolved = Resolved::of(b"SELECT $1", NONE);
        let types = |given: &'static [u8]| resolved.with_types(given, <[u8]>::to_vec);
        let (int4, int8) = (Described::parameters(INT4), Described::parameters(INT8));
        assert!(!resolved.makes(int8) && types(NONE) == NONE);
        resolved.learn(int4, INT4, NONE);
        resolved.learn(int8, INT8, NONE);
        assert!(resolved.makes(int8) && !resolved.makes(int4), "the later counts");
        assert!(!resolved.makes(int8.with(Described::rows(None))), "rows have to be asked for");
        assert!(!resolved.makes(Described::default()), "nothing has to be made");
        assert_eq!(types(NONE), INT8);
        assert_eq!((resolved.certain(true), resolved.certain(false)), ((int8, true), (Described::default(), false)));
        let other = Resolved::default();
        other.learn_from(&resolved);
        assert!(other.makes(int8));
        resolved.forget();
        assert!(!resolved.makes(int8) && other.makes(int8) && types(NONE) == NONE);
        // What the client has given itself is what it is.
        resolved.learn(int8, INT8, INT8);
        assert!(resolved.makes(int8) && types(INT8) == INT8);
        assert_eq!((resolved.certain(true), resolved.certain(false)), ((int8, false), (int8, false)));
    }

    #[test]
    fn what_is_no_description_is_not_learned() {
        for body in [
            &b""[..],
            b"\0",
            b"\0\x02\0\0\0\x17",
            b"\0\x01\0\0\0\x17\0",
            &[&b"\xff\xff"[..], &vec![1; 4 * 65535]].concat(),
        ] {
            let resolved = Resolved::of(b"SELECT $1", NONE);
            resolved.learn(Described::parameters(body), body, NONE);
            assert!(!resolved.makes(Described::parameters(body)), "{} bytes", body.len());
        }
    }
}
