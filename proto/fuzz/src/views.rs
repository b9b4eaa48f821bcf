//! Message views of both directions.

use pgweir_proto::backend::{self, Authentication, TxStatus};
use pgweir_proto::encode;
use pgweir_proto::error::Fields;
use pgweir_proto::frontend::{self, Bind, Parse, Target};

use crate::Source;

/// Which view; then the body of a message.
pub fn views(input: &[u8]) {
    let mut source = Source::new(input);
    let which = source.below(12);
    let body = source.rest();
    match which {
        0 => parse(body),
        1 => bind(body),
        2 => target(body),
        3 => {
            let got = frontend::query_text(body).ok();
            let want = body.split_last().filter(|(last, text)| **last == 0 && !text.contains(&0)).map(|(_, text)| text);
            assert_eq!(got, want);
        }
        4 => sasl_initial(body),
        5 => authentication(body),
        6 => {
            let got = backend::parameter_status(body).ok();
            let want = cut(body).and_then(|(name, rest)| Some((name, cut(rest)?.0)));
            assert_eq!(got, want);
        }
        7 => {
            let got = backend::backend_key_data(body).ok();
            let key = |(pid, secret): (&[u8; 4], _)| (u32::from_be_bytes(*pid), secret);
            let want = body.split_first_chunk::<4>().filter(|(_, secret)| (4..=256).contains(&secret.len())).map(key);
            assert_eq!(got, want);
        }
        8 => assert_eq!(backend::command_tag(body).ok(), cut(body).map(|(tag, _)| tag)),
        9 => assert_eq!(TxStatus::parse(body).is_ok(), matches!(body, b"I" | b"T" | b"E")),
        10 => fields(body),
        _ => tags(body),
    }
}

/// What is in front of the first NUL, and what is behind it.
fn cut(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    Some((&bytes[..end], &bytes[end + 1..]))
}

fn parse(body: &[u8]) {
    let Ok(parse) = Parse::parse(body) else {
        let types = cut(body).and_then(|(_, rest)| Some(cut(rest)?.1));
        let whole = |types: &[u8]| {
            types.len() >= 2 && types.len() == 2 + 4 * usize::from(types[0]) * 256 + 4 * usize::from(types[1])
        };
        assert!(!types.is_some_and(whole), "a whole Parse is refused");
        return;
    };
    let mut again = Vec::new();
    encode::parse(&mut again, parse.statement, parse.query, parse.types);
    assert_eq!(&again[5..], body);
}

fn bind(body: &[u8]) {
    let want = cut(body).and_then(|(portal, rest)| {
        let (statement, rest) = cut(rest)?;
        Some(Bind { portal, statement, rest })
    });
    assert_eq!(Bind::parse(body).ok(), want);
}

fn target(body: &[u8]) {
    let want = match body.split_first() {
        Some((b'S', rest)) => cut(rest).map(|(name, _)| Target::Statement(name)),
        Some((b'P', rest)) => cut(rest).map(|(name, _)| Target::Portal(name)),
        _ => None,
    };
    assert_eq!(Target::parse(body).ok(), want);
}

fn sasl_initial(body: &[u8]) {
    let Ok((mechanism, data)) = frontend::sasl_initial(body) else { return };
    let mut again = mechanism.to_vec();
    again.push(0);
    let length = data.map_or(u32::MAX, |data| u32::try_from(data.len()).unwrap());
    again.extend_from_slice(&length.to_be_bytes());
    again.extend_from_slice(data.unwrap_or_default());
    assert_eq!(again, body);
}

fn authentication(body: &[u8]) {
    let Ok(read) = Authentication::parse(body) else {
        assert!(body.len() < 8, "an Authentication message of {} bytes is refused", body.len());
        return;
    };
    let (kind, data) = match read {
        Authentication::Ok => (0, None),
        Authentication::Cleartext => (3, None),
        Authentication::Md5 { ref salt } => (5, Some(&salt[..])),
        Authentication::Sasl { mechanisms } => (10, Some(mechanisms)),
        Authentication::SaslContinue(data) => (11, Some(data)),
        Authentication::SaslFinal(data) => (12, Some(data)),
        Authentication::Other(kind) => (kind, None),
    };
    assert_eq!(body[..4], u32::to_be_bytes(kind));
    assert!(data.is_none_or(|data| body[4..].starts_with(data)));
}

fn fields(body: &[u8]) {
    let Ok(fields) = Fields::parse(body) else { return };
    let _ = (fields.is_fatal(), fields.sqlstate().as_str().len());
    assert_eq!(fields.sqlstate().0 == *b"XX000", fields.code.len() != 5 || fields.code == b"XX000");
    // Nothing is made up: each is a field of the body, from its kind to its NUL.
    for (kinds, value) in [(&b"SV"[..], fields.severity), (b"C", fields.code), (b"M", fields.message)] {
        let is_there = |kind: &u8| {
            let field = [std::slice::from_ref(kind), value, b"\0"].concat();
            body.windows(field.len()).any(|window| window == field)
        };
        assert!(value.is_empty() || kinds.iter().any(is_there));
    }
}

/// Every byte of the body as a tag.
fn tags(body: &[u8]) {
    for byte in body {
        assert!(
            backend::Tag::from_byte(*byte).is_ok_and(|tag| tag as u8 == *byte)
                || !byte.is_ascii_alphanumeric()
                || backend::Tag::from_byte(*byte).is_err()
        );
        assert!(frontend::Tag::from_byte(*byte).map_or(true, |tag| tag as u8 == *byte));
    }
}
