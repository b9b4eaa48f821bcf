//! Texts with something of ours in them: which of the answers are ours, and where an error points in the client's own text.

/// A text for the server, and what tells its answers from those that the client is owed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Splice {
    /// The answers: how many have come.
    pub done: usize,
    /// Those that are ours, counted from 0.
    pub ours: Vec<usize>,
    /// Where it differs from the client's own, in its order.
    pub cuts: Vec<Cut>,
}

/// Where the server's text has more, or something else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Characters of the server's text in front of what is ours.
    pub at: usize,
    /// Characters of it.
    pub put: usize,
    /// Characters of the client's text that it replaces.
    pub gone: usize,
}

impl Splice {
    /// Bytes it takes.
    #[must_use]
    pub const fn size(&self) -> usize {
        size_of::<Self>() + self.ours.len() * size_of::<usize>() + self.cuts.len() * size_of::<Cut>()
    }

    /// Whether the answer under way is that to something of ours.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.ours.binary_search(&self.done).is_ok()
    }

    /// A statement is done.
    pub const fn complete(&mut self) {
        self.done += 1;
    }

    /// The place in the client's text of a character of the server's, both counted from 1. What is ours is where it was put.
    #[must_use]
    pub fn position(&self, position: usize) -> usize {
        let (mut put, mut gone) = (0, 0);
        for cut in self.cuts.iter().take_while(|cut| cut.at < position) {
            if position <= cut.at + cut.put {
                return (cut.at + 1 + gone).saturating_sub(put);
            }
            put += cut.put;
            gone += cut.gone;
        }
        (position + gone).saturating_sub(put)
    }

    /// The body of an error or a notice with the position in it that the client is to be told. None if it is the same.
    #[must_use]
    pub fn shift(&self, body: &[u8]) -> Option<Vec<u8>> {
        let mut rest = body;
        while let Some((&kind, value)) = rest.split_first() {
            let end = memchr::memchr(0, value)?;
            if kind == b'P' {
                let front = body.len() - value.len();
                let (digits, back) = value.split_at_checked(end)?;
                let told = std::str::from_utf8(digits).ok()?.parse().ok()?;
                let position = self.position(told);
                let made = || [body.get(..front).unwrap_or_default(), position.to_string().as_bytes(), back].concat();
                return (position != told).then(made);
            }
            rest = value.get(end + 1..)?;
        }
        None
    }
}
