//! Both roles against each other, against other implementations, and against hostile bytes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may fail")]

use super::*;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use postgres_protocol::authentication::sasl;
use proptest::prelude::*;

const SALT: &[u8] = b"0123456789abcdef";
const CLIENT_NONCE: [u8; NONCE_BYTES] = *b"client's own nonce";
const SERVER_NONCE: [u8; NONCE_BYTES] = *b"server's own nonce";
/// `CLIENT_NONCE` and `SERVER_NONCE` on the wire.
const CLIENT_NONCE_TEXT: &str = "Y2xpZW50J3Mgb3duIG5vbmNl";
const BOTH_NONCES_TEXT: &str = "Y2xpZW50J3Mgb3duIG5vbmNlc2VydmVyJ3Mgb3duIG5vbmNl";
const MAX_ITERATIONS: u32 = 100_000;

fn server(password: &[u8], channel: ChannelBinding) -> ServerExchange {
    ServerExchange::new(Verifier::derive(password, SALT, 1), SERVER_NONCE, channel)
}

fn client(channel: &ChannelBinding) -> ClientExchange {
    ClientExchange::new(CLIENT_NONCE, channel)
}

fn malformed(message: &'static str, expected: &'static str) -> ScramError {
    ScramError::Malformed { message, expected }
}

fn end_point(data: &[u8]) -> ChannelBinding {
    ChannelBinding::EndPoint(data.to_vec())
}

/// A whole login with ours on both sides, in which `tamper` sees each of the four messages on its
/// way.
fn login(
    password: &[u8],
    server: &mut ServerExchange,
    channel: &ChannelBinding,
    mut tamper: impl FnMut(usize, &mut Vec<u8>),
) -> Result<Verified, ScramError> {
    let mut client = client(channel);
    let mut message = client.first();
    tamper(0, &mut message);
    message = server.client_first(&message)?;
    tamper(1, &mut message);
    let challenge = client.server_first(&message, MAX_ITERATIONS)?;
    let keys = Keys::derive(password, &challenge.salt, challenge.iterations);
    message = client.client_final(&keys)?;
    tamper(2, &mut message);
    let mut verified = server.client_final(&message)?;
    tamper(3, &mut verified.server_final);
    client.server_final(&verified.server_final)?;
    Ok(verified)
}

fn untouched(_: usize, _: &mut Vec<u8>) {}

/// RFC 7677 §3.
mod rfc7677 {
    use super::*;

    const FIRST: &[u8] = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO";
    const CHALLENGE: &[u8] = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
    const FINAL: &[u8] = b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
        p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
    const OUTCOME: &[u8] = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";
    /// The salt of the challenge, decoded.
    #[rustfmt::skip]
    const SALT: [u8; 16] = [
        0x5b, 0x6d, 0x99, 0x68, 0x9d, 0x12, 0x35, 0x8e, 0xec, 0xa0, 0x4b, 0x14, 0x12, 0x36, 0xfa,
        0x81,
    ];

    #[test]
    fn the_client_role_gives_the_example_of_the_rfc() {
        let nonce = "rOprNGfwEbeRWgbNEkqO".to_owned();
        let mut client = ClientExchange::with_nonce("user", nonce, &ChannelBinding::Unavailable);
        assert_eq!(client.first(), FIRST);
        let challenge = client.server_first(CHALLENGE, 4096).unwrap();
        assert_eq!(challenge, Challenge { salt: SALT.to_vec(), iterations: 4096 });
        let keys = Keys::derive(b"pencil", &challenge.salt, challenge.iterations);
        assert_eq!(client.client_final(&keys).unwrap(), FINAL);
        assert_eq!(client.server_final(OUTCOME), Ok(()));
    }

    #[test]
    fn the_server_role_gives_the_example_of_the_rfc() {
        let nonce = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0".to_owned();
        let verifier = Verifier::derive(b"pencil", &SALT, 4096);
        let mut server = ServerExchange::with_nonce(verifier, nonce, ChannelBinding::Unavailable);
        assert_eq!(server.client_first(FIRST).unwrap(), CHALLENGE);
        assert_eq!(server.client_final(FINAL).unwrap().server_final, OUTCOME);
    }
}

/// Verifiers that Postgres 15.x made from these passwords (`CREATE ROLE … PASSWORD …`).
#[rustfmt::skip]
const POSTGRES_MADE: [(&str, &str, &str); 19] = [
    ("ASCII", "pencil",
        "SCRAM-SHA-256$4096:/fsxTZw/WWWgc1/CrPWlAw==$DP4U/HR6d3bPhhv5w1nGWdny/dqPG4XHFB07mwsuWjU=:ZP343H7/5GsUv2VSKuIyzNXpqf6hJQUqfTO3Bu5Ge1Y="),
    ("normal already", "p\u{e4}ss",
        "SCRAM-SHA-256$4096:TdT/zLru1fuRK9mDqVZBxA==$aOxqsY0AAXPSs/5kMxymaHmZF49/XvRfKE01QMIHIXo=:8xEg5h7HMWcHfgrmshoO9UQoduqRsk8FSRor5/ArXBM="),
    ("compatibility (RFC 4013 §3)", "\u{2168}",
        "SCRAM-SHA-256$4096:hML4RKd5oxS7Nv7fkFS7Wg==$BS5QWgs58ypq7SuCtp9HfHqN6LM1Q5NFts+LeJvOiY4=:ndMRnW1GmGiUe5141HtA/zdSeYuRnbdAYrLDAdf7pGc="),
    ("space of another kind", "a\u{a0}b",
        "SCRAM-SHA-256$4096:GuFKappDQ/j/W6meYlrvAQ==$3UPJ4qsJ9le7hUdmMmHOsFH4tRZW5AGtGL9m7v3vZR0=:CjGHh2lbW7LQrIwM0UloqEZ8Z19qyspwZpX7+6Lis1c="),
    ("mapped to nothing (RFC 4013 §3)", "I\u{ad}X",
        "SCRAM-SHA-256$4096:K2Hfkla+TmYXkOu46KvDow==$DKaJl9w5LNDnnfYHhtNhg0Zj4N+pvrM1edqZVyAmyDs=:FbjenwOARk45EU0ARzMhjc5DshRDyk5SXJFMHKNRXQw="),
    ("nothing left", "\u{ad}",
        "SCRAM-SHA-256$4096:Zu+ZwHKf4i+lurcgg3OtRA==$t6kMAayBwosOqNxfJZ0vvh0ij/qhF0w8VzdFujzm9H4=:GcIEZzp7AKu1Ihyfk/Ot/qhWFSiL2qxN8nvX+OpL8Xc="),
    ("prohibited, its NFKC not", "\u{340}a",
        "SCRAM-SHA-256$4096:dlGDrcYaYvKcCcADUn4xZw==$/I/dqriffqSMX3uu0F5CODhp/U0nB3bma6j8X7vQWL8=:5mNwlHwYi2xnoEscuApIuklnXECjBT88vga7PTyFPN8="),
    ("unassigned, its NFKC not", "a\u{1f100}",
        "SCRAM-SHA-256$4096:vJb5oYASAGkLyOr9KDU86Q==$uSQa7X4APtQB1KoFwGxfGRvQpIl0x14povoDrj0ITw0=:klwAzy3tuXm2S4P8vr+x+R97srG9QVqHh80SZe/B6Sg="),
    ("directions mixed by NFKC", "a \u{2135}",
        "SCRAM-SHA-256$4096:/CpdExivYriG22mIJSO04Q==$sdpB6Ms1UKcTW/kn+lZPmKMHyfH1UJVDSFrltzngXQo=:2jplwMEDxT2ORKYKeCc7q/QQ7rNCn912Zmmpgylc/1c="),
    ("direction lost by NFKC", "\u{fc5e}\u{627}",
        "SCRAM-SHA-256$4096:qwfqRAuzgWcfr7X5lGlVig==$JtPloaR2XwPIOv9UGDLYzN6MD5xAS7CPWOemjlDnUM8=:px4mem9P0ajkmyx9aDamfd9+y5pvH7YtRL2Tq7L4h3E="),
    ("space and nothing at once", "x\u{200b}y",
        "SCRAM-SHA-256$4096:mydj0JxB1yq8DYf4pVyn9g==$7CDhYMiWG6b3/+DyPCW+1+80KS6Ww44XioQjcuYVKpo=:kTBgV5eyaCARG0WMAQ2qmv9I7d7fwYZYX6Rkk2L+Y5A="),
    ("decomposed", "cafe\u{301}",
        "SCRAM-SHA-256$4096:k+6I0UXt4kinCeyw1PdndQ==$B8/ZySEEM8kijCpRb3b1Kzhz2M1cLUBakfkT0o8gaBw=:ojlazmCLMSqdYZkoKMlB+EiCY0uDfGHA3vxt2hWxY1s="),
    ("right-to-left, digit last", "\u{627}\u{b9}",
        "SCRAM-SHA-256$4096:VqakccW7KL7qrP/PV9Rq7Q==$teqvCchc/hRxvGr7UOXwFAcY/s2WXcu/B2ZRRRZPxXw=:/6am7LtXOfkC3O3L2LrxujeAyYEHeLnwArufHjeNjWo="),
    ("directions mixed", "\u{fb01}\u{627}",
        "SCRAM-SHA-256$4096:HdqmmpbnEiwfiVY0+riUtg==$6pwQLLejqiPa15KCFujhbzK2SwxDJh6pr8x5C9mmUo4=:NzCLdd4eL1ekE0piDFbX/VrDpoVa1tdc6me8uoDS2bw="),
    ("ASCII control", "\u{fb01}\u{9}",
        "SCRAM-SHA-256$4096:IkyqiOrWC5NXhSbgOnrlng==$Wh1McNDHUV6mpE1uL/CA/3geRmwTkFVlYk00RJegKn0=:MCHcWQhxd50NeKQOHCNZ4C9/W1YuI5XPFLJRnNkycnU="),
    ("ligature", "\u{fb01}x",
        "SCRAM-SHA-256$4096:nqzk6QJNcHuULX8cB5F57A==$OAOrdKJFisZDXStMjer5tMSd+w/4TdgTO0Y7+r1z3VY=:v/PWW5Z5oOzgEftlgBtuDuzfRKEXlmIlAkaZg16jHYg="),
    ("unassigned in Unicode 3.2", "\u{1f600}\u{fb01}",
        "SCRAM-SHA-256$4096:c/WpBgel8lp504UN5LJK7A==$xZ3f6RZ9Tvyz18DygnKaAWjUNOPOliqAqISMn942jbs=:ws2T9KtQ4q0pk6UAaE59LVPfSQuaCcboAtrLdOoqIUU="),
    ("SCRAM's own characters", "'quote$,=",
        "SCRAM-SHA-256$4096:6XdbCf8DBDqptM4AfUkyYg==$Y/jDh++9ndRjyZN/hkuKCUSdXQr9JeeXlC4XKdrec0M=:1UIF+n79RL+dZXbpukHqYDDLAliFKrTxKDeTGeREiXg="),
    ("longer than a block", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "SCRAM-SHA-256$4096:A2qFp5zAaIbZ3OIcBEnqsQ==$3JuufMWXx3pyfyxvpl2mLiCXW8XiUQP73rSJI7M7ngo=:O0wo+Nee7LbKOplbu5hwHQZVDqbnlGe08H5qLfxKSGM="),
];

#[test]
fn passwords_are_prepared_as_postgres_does() {
    for (name, password, text) in POSTGRES_MADE {
        let verifier = Verifier::parse(text).unwrap();
        assert!(verifier.matches_password(password.as_bytes()), "{name}");
        assert!(!verifier.matches_password(format!("{password}x").as_bytes()), "{name}");
        assert_eq!(verifier.encode(), text, "{name}");
        let made = Verifier::derive(password.as_bytes(), verifier.salt(), verifier.iterations());
        assert_eq!(made.encode(), text, "{name}");
        assert!(made == verifier, "{name}");
    }
}

#[test]
fn a_password_that_is_not_utf8_is_taken_as_it_is() {
    assert_eq!(*password::prepare(b"a\xc2\xadb"), *b"ab");
    assert_eq!(*password::prepare(b"a\xc2\xadb\xff"), *b"a\xc2\xadb\xff");
    assert_eq!(*password::prepare(b""), *b"");
}

#[test]
fn a_verifier_is_read_whole_or_not_at_all() {
    const KEY: &str = "LZLuvBJbRYjfgOuOX3P0uSXTiJorkjftzlzCrxc312Q=";
    let long_salt = "A".repeat(1368);
    let longer_salt = "A".repeat(1372);
    #[rustfmt::skip]
    let table: [(&str, String, Option<&str>); 26] = [
        ("as made",             format!("SCRAM-SHA-256$4096:AAAA${KEY}:{KEY}"), None),
        ("one iteration",       format!("SCRAM-SHA-256$1:AAAA${KEY}:{KEY}"), None),
        ("most iterations",     format!("SCRAM-SHA-256$2147483647:AAAA${KEY}:{KEY}"), None),
        ("long salt",           format!("SCRAM-SHA-256$1:{}==${KEY}:{KEY}", &long_salt[..1366]), None),
        ("empty",               String::new(), Some("SCRAM-SHA-256$")),
        ("a password",          "hunter2".to_owned(), Some("SCRAM-SHA-256$")),
        ("MD5",                 "md5d8578edf8458ce06fbc5bb76a58c5ca4".to_owned(), Some("SCRAM-SHA-256$")),
        ("lower case",          format!("scram-sha-256$4096:AAAA${KEY}:{KEY}"), Some("SCRAM-SHA-256$")),
        ("space in front",      format!(" SCRAM-SHA-256$4096:AAAA${KEY}:{KEY}"), Some("SCRAM-SHA-256$")),
        ("name only",           "SCRAM-SHA-256$".to_owned(), Some("keys")),
        ("no keys",             "SCRAM-SHA-256$4096:AAAA".to_owned(), Some("keys")),
        ("no salt",             format!("SCRAM-SHA-256$4096${KEY}:{KEY}"), Some("salt")),
        ("empty salt",          format!("SCRAM-SHA-256$4096:${KEY}:{KEY}"), Some("salt")),
        ("salt not base64",     format!("SCRAM-SHA-256$4096:A-_A${KEY}:{KEY}"), Some("salt")),
        ("salt unpadded",       format!("SCRAM-SHA-256$4096:AAA${KEY}:{KEY}"), Some("salt")),
        ("salt of 1026 bytes",  format!("SCRAM-SHA-256$1:{long_salt}${KEY}:{KEY}"), Some("salt")),
        ("salt longer still",   format!("SCRAM-SHA-256$1:{longer_salt}${KEY}:{KEY}"), Some("salt")),
        ("no iterations",       format!("SCRAM-SHA-256$:AAAA${KEY}:{KEY}"), Some("iterations")),
        ("zero iterations",     format!("SCRAM-SHA-256$0:AAAA${KEY}:{KEY}"), Some("iterations")),
        ("signed iterations",   format!("SCRAM-SHA-256$+1:AAAA${KEY}:{KEY}"), Some("iterations")),
        ("too many iterations", format!("SCRAM-SHA-256$2147483648:AAAA${KEY}:{KEY}"), Some("iterations")),
        ("one key",             format!("SCRAM-SHA-256$4096:AAAA${KEY}"), Some("server key")),
        ("short stored key",    format!("SCRAM-SHA-256$4096:AAAA$AAAA:{KEY}"), Some("32-byte stored key")),
        ("33-byte server key",  format!("SCRAM-SHA-256$4096:AAAA${KEY}:{}", "A".repeat(44)), Some("32-byte server key")),
        ("key of any length",   format!("SCRAM-SHA-256$4096:AAAA${KEY}:{}", "A".repeat(4400)), Some("32-byte server key")),
        ("newline at the end",  format!("SCRAM-SHA-256$4096:AAAA${KEY}:{KEY}\n"), Some("32-byte server key")),
    ];
    for (name, text, want) in table {
        let got = Verifier::parse(&text);
        assert_eq!(got.as_ref().err().map(|bad| bad.expected), want, "{name}");
        if let Ok(verifier) = got {
            assert_eq!(verifier.encode(), text, "{name}");
        }
    }
}

#[test]
fn a_mock_verifier_keeps_its_salt_and_fails_like_a_wrong_password() {
    let mock = |secret: u8, user: &[u8]| Verifier::mock(&[secret; 32], user, 4096);
    assert!(mock(1, b"alice") == mock(1, b"alice"));
    assert_ne!(mock(1, b"alice").salt(), mock(1, b"bob").salt());
    assert_ne!(mock(1, b"alice").salt(), mock(2, b"alice").salt());
    assert_eq!(mock(1, b"alice").salt().len(), 16);
    assert_eq!(mock(1, b"alice").iterations(), 4096);
    assert_ne!(mock(1, b"alice").server_key(), mock(1, b"bob").server_key());

    let verifier = Verifier::mock(&[7; 32], b"nobody", 1);
    let mut server = ServerExchange::new(verifier, SERVER_NONCE, ChannelBinding::Unused);
    let outcome = login(b"pencil", &mut server, &ChannelBinding::Unavailable, untouched);
    assert_eq!(outcome.err(), Some(ScramError::WrongProof));
}

#[test]
fn nothing_that_opens_a_server_is_shown() {
    let mut server = server(b"pencil", ChannelBinding::Unused);
    let proven = login(b"pencil", &mut server, &ChannelBinding::Unavailable, untouched).unwrap();
    let keys = Keys::derive(b"pencil", SALT, 1);
    let verifier = Verifier::derive(b"pencil", SALT, 1);
    assert_eq!(format!("{proven:?}"), "Verified { .. }");
    assert_eq!(format!("{keys:?}"), "Keys { .. }");
    assert_eq!(format!("{verifier:?}"), "Verifier { iterations: 1, .. }");
    assert!(format!("{server:?}").contains("verifier: Verifier { iterations: 1, .. }"));
    let mut answered = client(&ChannelBinding::Unavailable);
    let challenge = format!("r={BOTH_NONCES_TEXT},s=AAAA,i=1");
    answered.server_first(challenge.as_bytes(), 1).unwrap();
    answered.client_final(&keys).unwrap();
    assert!(format!("{answered:?}").ends_with("state: Proved }"));
    let error = Verifier::parse("SCRAM-SHA-256$4096:hunter2").unwrap_err();
    assert!(!format!("{error} {error:?}").contains("hunter2"));
}

#[test]
fn the_sides_agree_on_channel_binding_or_end() {
    use ChannelBinding::{Unavailable, Unused};
    let same = end_point(b"certificate");
    let other = end_point(b"another one");
    let refused = malformed("client-first-message", "no channel-binding data");
    let missing = malformed("client-first-message", "channel-binding data");
    #[rustfmt::skip]
    let table = [
        ("n to a server that cannot",   Unavailable,  Unavailable,  None),
        ("y to a server that cannot",   Unused,       Unavailable,  None),
        ("p to a server that cannot",   same.clone(), Unavailable,  Some(refused)),
        ("n to a server that offered",  Unavailable,  Unused,       None),
        ("y to a server that offered",  Unused,       Unused,       Some(ScramError::Downgrade)),
        ("p under the plain name",      same.clone(), Unused,       Some(refused)),
        ("n under the name PLUS",       Unavailable,  same.clone(), Some(missing)),
        ("y under the name PLUS",       Unused,       same.clone(), Some(missing)),
        ("p with the same certificate", same.clone(), same.clone(), None),
        ("p with another certificate",  other,        same.clone(), Some(ScramError::BindingMismatch)),
    ];
    for (name, ours, theirs, want) in table {
        let outcome = login(b"pencil", &mut server(b"pencil", theirs), &ours, untouched);
        assert_eq!(outcome.err(), want, "{name}");
    }
    assert_eq!(Unavailable.mechanism(), "SCRAM-SHA-256");
    assert_eq!(Unused.mechanism(), "SCRAM-SHA-256");
    assert_eq!(same.mechanism(), "SCRAM-SHA-256-PLUS");
}

#[test]
fn the_first_message_of_a_client_is_read_as_postgres_reads_it() {
    use ScramError::{BindingType, TooLong, Unsupported};
    let bad = |expected| Some(malformed("client-first-message", expected));
    let nonce = |length: usize| [b"n,,n=,r=", "x".repeat(length).as_bytes()].concat();
    let message = |length: usize| [b"n,,n=,r=x,a=", "x".repeat(length - 12).as_bytes()].concat();
    let long_nonce = TooLong { field: "nonce", length: 1025, limit: 1024 };
    let long_message = TooLong { field: "message", length: 65_537, limit: 65_536 };
    let authzid = Unsupported { feature: "authorization identity" };
    let extension = Unsupported { feature: "mandatory extension" };
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>, Option<ScramError>); 34] = [
        ("as libpq sends it",     b"n,,n=,r=abc".to_vec(), None),
        ("with a user name",      b"n,,n=alice,r=abc".to_vec(), None),
        ("any user name",         b"n,,n=a=2C\xff=zz,r=abc".to_vec(), None),
        ("optional extensions",   b"n,,n=,r=abc,x=1,y=,Z=a=b".to_vec(), None),
        ("a nonce of 1 KiB",      nonce(1024), None),
        ("a message of 64 KiB",   message(65_536), None),
        ("a longer nonce",        nonce(1025), Some(long_nonce)),
        ("a longer message",      message(65_537), Some(long_message)),
        ("empty",                 b"".to_vec(), bad("attribute")),
        ("a NUL at the end",      b"n,,n=,r=abc\0".to_vec(), bad("text without NUL")),
        ("a NUL within",          b"n,,n=\0,r=abc".to_vec(), bad("text without NUL")),
        ("no flag",               b",,n=,r=abc".to_vec(), bad("channel-binding flag")),
        ("unknown flag",          b"x,,n=,r=abc".to_vec(), bad("channel-binding flag")),
        ("flag with more",        b"nn,,n=,r=abc".to_vec(), bad("channel-binding flag")),
        ("p without type",        b"p,,n=,r=abc".to_vec(), bad("channel-binding flag")),
        ("type tls-unique",       b"p=tls-unique,,n=,r=abc".to_vec(), Some(BindingType)),
        ("empty type",            b"p=,,n=,r=abc".to_vec(), Some(BindingType)),
        ("flag alone",            b"n".to_vec(), bad("comma")),
        ("header alone",          b"n,".to_vec(), bad("comma")),
        ("header complete",       b"n,,".to_vec(), bad("user name")),
        ("authorization id",      b"n,a=bob,n=,r=abc".to_vec(), Some(authzid)),
        ("something in its place",b"n,b=bob,n=,r=abc".to_vec(), bad("comma")),
        ("mandatory extension",   b"n,,m=ext,n=,r=abc".to_vec(), Some(extension)),
        ("no user name",          b"n,,r=abc".to_vec(), bad("user name")),
        ("no nonce",              b"n,,n=".to_vec(), bad("nonce")),
        ("order reversed",        b"n,,r=abc,n=".to_vec(), bad("user name")),
        ("empty nonce",           b"n,,n=,r=".to_vec(), bad("printable nonce")),
        ("a space in the nonce",  b"n,,n=,r=a b".to_vec(), bad("printable nonce")),
        ("DEL in the nonce",      b"n,,n=,r=a\x7fb".to_vec(), bad("printable nonce")),
        ("UTF-8 in the nonce",    "n,,n=,r=ä".as_bytes().to_vec(), bad("printable nonce")),
        ("comma at the end",      b"n,,n=,r=abc,".to_vec(), bad("attribute")),
        ("extension no letter",   b"n,,n=,r=abc,1=2".to_vec(), bad("attribute")),
        ("extension no value",    b"n,,n=,r=abc,x".to_vec(), bad("attribute")),
        ("upper-case attributes", b"n,,N=,R=abc".to_vec(), bad("user name")),
    ];
    for (name, message, want) in table {
        let mut server = server(b"pencil", ChannelBinding::Unavailable);
        assert_eq!(server.client_first(&message).err(), want, "{name}");
        if want.is_some() {
            let over = ScramError::OutOfTurn { message: "client-first-message" };
            assert_eq!(server.client_first(b"n,,n=,r=abc").err(), Some(over), "{name}");
        }
    }
}

#[test]
fn the_last_message_of_a_client_tells_a_wrong_proof_from_a_broken_one() {
    use ScramError::{NonceMismatch, TooLong, WrongProof};
    let bad = |expected| Some(malformed("client-final-message", expected));
    let wrong = STANDARD.encode([0; 32]);
    let short = STANDARD.encode([0; 31]);
    let long = STANDARD.encode([0; 33]);
    let n = BOTH_NONCES_TEXT;
    let filler = "x".repeat(65_536);
    let too_long = TooLong { field: "message", length: 65_546 + n.len(), limit: 65_536 };
    #[rustfmt::skip]
    let table: [(&str, String, Option<ScramError>); 21] = [
        ("wrong proof",           format!("c=biws,r={n},p={wrong}"), Some(WrongProof)),
        ("with an extension",     format!("c=biws,r={n},x=1,p={wrong}"), Some(WrongProof)),
        ("half of the nonce",     format!("c=biws,r={CLIENT_NONCE_TEXT},p={wrong}"), Some(NonceMismatch)),
        ("more than the nonce",   format!("c=biws,r={n}A,p={wrong}"), Some(NonceMismatch)),
        ("no nonce to speak of",  format!("c=biws,r=,p={wrong}"), Some(NonceMismatch)),
        ("another flag",          format!("c=eSws,r={n},p={wrong}"), bad("the first message's channel binding")),
        ("data after the flag",   format!("c=biwsAAAA,r={n},p={wrong}"), bad("the first message's channel binding")),
        ("empty binding",         format!("c=,r={n},p={wrong}"), bad("the first message's channel binding")),
        ("no binding",            format!("r={n},p={wrong}"), bad("channel binding")),
        ("no nonce",              format!("c=biws,p={wrong}"), bad("nonce")),
        ("no proof",              format!("c=biws,r={n}"), bad("attribute")),
        ("extension and no proof",format!("c=biws,r={n},x=1"), bad("attribute")),
        ("empty proof",           format!("c=biws,r={n},p="), bad("32-byte proof")),
        ("short proof",           format!("c=biws,r={n},p={short}"), bad("32-byte proof")),
        ("long proof",            format!("c=biws,r={n},p={long}"), bad("32-byte proof")),
        ("proof not base64",      format!("c=biws,r={n},p={}!", &wrong[1..]), bad("32-byte proof")),
        ("proof unpadded",        format!("c=biws,r={n},p={}", &wrong[..43]), bad("32-byte proof")),
        ("more after the proof",  format!("c=biws,r={n},p={wrong},x=1"), bad("end of message")),
        ("comma after the proof", format!("c=biws,r={n},p={wrong},"), bad("end of message")),
        ("empty",                 String::new(), bad("attribute")),
        ("too long",              format!("c=biws,r={n},{filler}"), Some(too_long)),
    ];
    for (name, message, want) in table {
        let mut server = server(b"pencil", ChannelBinding::Unavailable);
        server.client_first(&client(&ChannelBinding::Unavailable).first()).unwrap();
        assert_eq!(server.client_final(message.as_bytes()).err(), want, "{name}");
        let over = ScramError::OutOfTurn { message: "client-final-message" };
        assert_eq!(server.client_final(message.as_bytes()).err(), Some(over), "{name}");
    }
}

#[test]
fn a_challenge_is_bounded_before_it_costs_anything() {
    use ScramError::{Iterations, NonceMismatch, Refused, TooLong, Unsupported};
    let bad = |expected| Some(malformed("server-first-message", expected));
    let n = BOTH_NONCES_TEXT;
    let own = CLIENT_NONCE_TEXT;
    let long = "A".repeat(1025 - n.len());
    let long_nonce = TooLong { field: "nonce", length: 1025, limit: 1024 };
    let salt = STANDARD.encode([0; 1025]);
    let long_salt = TooLong { field: "salt", length: 1025, limit: 1024 };
    let huge = "A".repeat(40_000);
    let huge_salt = TooLong { field: "salt in base64", length: 40_000, limit: 1368 };
    let too_many = Iterations { iterations: 100_001, limit: 100_000 };
    let extension = Unsupported { feature: "mandatory extension" };
    #[rustfmt::skip]
    let table: [(&str, String, Option<ScramError>); 31] = [
        ("as Postgres sends it",   format!("r={n},s=AAAA,i=4096"), None),
        ("one iteration",          format!("r={n},s=AAAA,i=1"), None),
        ("as many as allowed",     format!("r={n},s=AAAA,i=100000"), None),
        ("leading zeros",          format!("r={n},s=AAAA,i=0004096"), None),
        ("an extension",           format!("r={n},s=AAAA,i=4096,x=1"), None),
        ("one more than allowed",  format!("r={n},s=AAAA,i=100001"), Some(too_many)),
        ("zero iterations",        format!("r={n},s=AAAA,i=0"), bad("iteration count")),
        ("negative iterations",    format!("r={n},s=AAAA,i=-1"), bad("iteration count")),
        ("signed iterations",      format!("r={n},s=AAAA,i=+1"), bad("iteration count")),
        ("2^32 iterations",        format!("r={n},s=AAAA,i=4294967296"), bad("iteration count")),
        ("no number",              format!("r={n},s=AAAA,i="), bad("iteration count")),
        ("more than a number",     format!("r={n},s=AAAA,i=4096x"), bad("iteration count")),
        ("no iterations",          format!("r={n},s=AAAA"), bad("iteration count")),
        ("our nonce only",         format!("r={own},s=AAAA,i=4096"), Some(NonceMismatch)),
        ("another nonce",          format!("r=x{n},s=AAAA,i=4096"), Some(NonceMismatch)),
        ("a part of our nonce",    format!("r={},s=AAAA,i=4096", &own[1..]), Some(NonceMismatch)),
        ("a nonce too long",       format!("r={n}{long},s=AAAA,i=4096"), Some(long_nonce)),
        ("a nonce with a space",   format!("r={n} ,s=AAAA,i=4096"), bad("printable nonce")),
        ("an empty nonce",         "r=,s=AAAA,i=4096".to_owned(), bad("printable nonce")),
        ("no nonce",               "s=AAAA,i=4096".to_owned(), bad("nonce")),
        ("no salt",                format!("r={n},i=4096"), bad("salt")),
        ("an empty salt",          format!("r={n},s=,i=4096"), bad("base64 salt")),
        ("a salt not base64",      format!("r={n},s=A-_A,i=4096"), bad("base64 salt")),
        ("a salt unpadded",        format!("r={n},s=AAA,i=4096"), bad("base64 salt")),
        ("a salt too long",        format!("r={n},s={salt},i=4096"), Some(long_salt)),
        ("a salt far too long",    format!("r={n},s={huge},i=4096"), Some(huge_salt)),
        ("a mandatory extension",  format!("m=x,r={n},s=AAAA,i=4096"), Some(extension)),
        ("an error",               "e=unknown-user".to_owned(), Some(Refused { reason: "unknown-user" })),
        ("empty",                  String::new(), bad("attribute")),
        ("a NUL",                  format!("r={n},s=AAAA,i=4096\0"), bad("text without NUL")),
        ("a comma at the end",     format!("r={n},s=AAAA,i=4096,"), bad("attribute")),
    ];
    for (name, message, want) in table {
        let mut client = client(&ChannelBinding::Unavailable);
        let got = client.server_first(message.as_bytes(), MAX_ITERATIONS);
        assert_eq!(got.err(), want, "{name}");
        let proof = client.client_final(&Keys::derive(b"pencil", SALT, 1));
        assert_eq!(proof.is_ok(), want.is_none(), "{name}");
    }
}

#[test]
fn a_server_must_prove_itself_too() {
    use ScramError::{Refused, WrongServerSignature};
    let bad = |expected| Some(malformed("server-final-message", expected));
    let wrong = STANDARD.encode([0; 32]);
    #[rustfmt::skip]
    let table: [(&str, String, Option<ScramError>); 11] = [
        ("another signature",    format!("v={wrong}"), Some(WrongServerSignature)),
        ("and an extension",     format!("v={wrong},x=1"), Some(WrongServerSignature)),
        ("a known reason",       "e=invalid-proof".to_owned(), Some(Refused { reason: "invalid-proof" })),
        ("reason and extension", "e=no-resources,x=1".to_owned(), Some(Refused { reason: "no-resources" })),
        ("an unknown reason",    "e=\x1b[2Jrude".to_owned(), Some(Refused { reason: "other-error" })),
        ("an empty reason",      "e=".to_owned(), Some(Refused { reason: "other-error" })),
        ("a short signature",    format!("v={}", &wrong[..40]), bad("32-byte server signature")),
        ("no signature",         "v=".to_owned(), bad("32-byte server signature")),
        ("something else",       format!("p={wrong}"), bad("server signature")),
        ("empty",                String::new(), bad("attribute")),
        ("a comma at the end",   format!("v={wrong},"), bad("attribute")),
    ];
    for (name, message, want) in table {
        let mut server = server(b"pencil", ChannelBinding::Unused);
        let outcome = login(b"pencil", &mut server, &ChannelBinding::Unavailable, |step, bytes| {
            if step == 3 {
                *bytes = message.clone().into_bytes();
            }
        });
        assert_eq!(outcome.err(), want, "{name}");
    }
}

#[test]
fn every_message_out_of_turn_is_refused() {
    let over = |message| Some(ScramError::OutOfTurn { message });
    let keys = Keys::derive(b"pencil", SALT, 1);
    let mut fresh = client(&ChannelBinding::Unavailable);
    assert_eq!(fresh.client_final(&keys).err(), over("client-final-message"));
    let challenge = format!("r={BOTH_NONCES_TEXT},s=AAAA,i=1");
    let mut fresh = client(&ChannelBinding::Unavailable);
    assert_eq!(fresh.server_final(b"v=").err(), over("server-final-message"));
    assert_eq!(fresh.server_first(challenge.as_bytes(), 1).err(), over("server-first-message"));
    let mut fresh = server(b"pencil", ChannelBinding::Unavailable);
    assert_eq!(fresh.client_final(b"c=biws").err(), over("client-final-message"));
    assert_eq!(fresh.client_first(b"n,,n=,r=a").err(), over("client-first-message"));
    let mut fresh = server(b"pencil", ChannelBinding::Unavailable);
    fresh.client_first(b"n,,n=,r=a").unwrap();
    assert_eq!(fresh.client_first(b"n,,n=,r=a").err(), over("client-first-message"));
}

#[test]
fn a_flipped_bit_in_any_message_ends_the_login() {
    for channel in [ChannelBinding::Unavailable, end_point(b"certificate")] {
        let mut lengths = [0; 4];
        let mut measured = server(b"pencil", channel.clone());
        login(b"pencil", &mut measured, &channel, |step, bytes| lengths[step] = bytes.len()).unwrap();
        for (message, length) in lengths.into_iter().enumerate() {
            for bit in 0..length * 8 {
                let mut server = server(b"pencil", channel.clone());
                let outcome = login(b"pencil", &mut server, &channel, |step, bytes| {
                    if step == message {
                        bytes[bit / 8] ^= 1 << (bit % 8);
                    }
                });
                assert!(outcome.is_err(), "message {message}, bit {bit}");
            }
        }
    }
}

#[test]
fn the_keys_of_a_client_open_the_server_with_the_same_verifier() {
    let verifier = Verifier::derive(b"pencil", SALT, 3);
    let mut near = ServerExchange::new(verifier.clone(), SERVER_NONCE, ChannelBinding::Unavailable);
    let login = login(b"pencil", &mut near, &ChannelBinding::Unavailable, untouched).unwrap();

    let passed_on = Keys::new(login.client_key, *verifier.server_key());
    assert!(passed_on.verifier(SALT, 3) == verifier);
    let mut far = ServerExchange::new(verifier, [9; NONCE_BYTES], ChannelBinding::Unavailable);
    let mut client = ClientExchange::new([8; NONCE_BYTES], &ChannelBinding::Unavailable);
    let challenge = far.client_first(&client.first()).unwrap();
    client.server_first(&challenge, MAX_ITERATIONS).unwrap();
    let outcome = far.client_final(&client.client_final(&passed_on).unwrap()).unwrap();
    assert_eq!(client.server_final(&outcome.server_final), Ok(()));
}

/// `postgres-protocol`'s client against our server.
fn foreign_login(
    password: &[u8],
    server: &mut ServerExchange,
    channel: sasl::ChannelBinding,
) -> Result<(), ScramError> {
    let mut client = sasl::ScramSha256::new(password, channel);
    let challenge = server.client_first(client.message())?;
    client.update(&challenge).unwrap();
    let verified = server.client_final(client.message())?;
    client.finish(&verified.server_final).unwrap();
    Ok(())
}

#[test]
fn another_client_logs_in_to_our_server() {
    use sasl::ChannelBinding as Theirs;
    let plus = || Theirs::tls_server_end_point(b"certificate".to_vec());
    let known = Verifier::parse(POSTGRES_MADE[0].2).unwrap();
    #[rustfmt::skip]
    let table = [
        ("n",              "pencil", Theirs::unsupported(), ChannelBinding::Unavailable, None),
        ("n, offered",     "pencil", Theirs::unsupported(), ChannelBinding::Unused,      None),
        ("y",              "pencil", Theirs::unrequested(), ChannelBinding::Unavailable, None),
        ("y, offered",     "pencil", Theirs::unrequested(), ChannelBinding::Unused,      Some(ScramError::Downgrade)),
        ("p",              "pencil", plus(),                end_point(b"certificate"),   None),
        ("p, other data",  "pencil", plus(),                end_point(b"another"),       Some(ScramError::BindingMismatch)),
        ("wrong password", "pencils", Theirs::unsupported(), ChannelBinding::Unavailable, Some(ScramError::WrongProof)),
    ];
    for (name, password, theirs, ours, want) in table {
        let mut server = ServerExchange::new(known.clone(), SERVER_NONCE, ours);
        let outcome = foreign_login(password.as_bytes(), &mut server, theirs);
        assert_eq!(outcome.err(), want, "{name}");
    }
}

fn channels() -> impl Strategy<Value = ChannelBinding> {
    let data = prop::collection::vec(any::<u8>(), 0..64);
    prop_oneof![
        Just(ChannelBinding::Unavailable),
        Just(ChannelBinding::Unused),
        data.prop_map(ChannelBinding::EndPoint),
    ]
}

/// Bytes that come near the grammar more often than random ones do.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    #[rustfmt::skip]
    let token = prop::sample::select(vec![
        "n", "y", "p", "p=tls-server-end-point", ",", ",,", "=", "n=", "r=", "s=", "i=", "c=", "p=",
        "v=", "e=", "m=", "a=", "biws", "eSws", "AAAA", "4096", "0", CLIENT_NONCE_TEXT,
        BOTH_NONCES_TEXT, "invalid-proof", "\0", "ä", "LZLuvBJbRYjfgOuOX3P0uSXTiJorkjftzlzCrxc312Q=",
    ]);
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        prop::collection::vec(token, 0..12).prop_map(|tokens| tokens.concat().into_bytes()),
    ]
}

proptest! {
    #[test]
    fn the_right_password_logs_in_and_another_does_not(
        right in prop_oneof![any::<Vec<u8>>(), any::<String>().prop_map(String::into_bytes)],
        wrong in any::<Vec<u8>>(),
        channel in channels(),
        iterations in 1_u32..4,
        salt in prop::collection::vec(any::<u8>(), 1..64),
    ) {
        let ours = if channel == ChannelBinding::Unused {
            ChannelBinding::Unavailable
        } else {
            channel.clone()
        };
        let verifier = Verifier::derive(&right, &salt, iterations);
        let text = verifier.encode();
        prop_assert!(Verifier::parse(&text) == Ok(verifier.clone()));
        prop_assert!(verifier.matches_password(&right));
        let server = || ServerExchange::new(verifier.clone(), SERVER_NONCE, channel.clone());
        let verified = login(&right, &mut server(), &ours, untouched).unwrap();
        let keys = Keys::new(verified.client_key, *verifier.server_key());
        prop_assert!(keys.verifier(&salt, iterations) == verifier);
        if password::prepare(&wrong) != password::prepare(&right) {
            let outcome = login(&wrong, &mut server(), &ours, untouched);
            prop_assert_eq!(outcome.err(), Some(ScramError::WrongProof));
            prop_assert!(!verifier.matches_password(&wrong));
        }
    }

    #[test]
    fn hostile_bytes_never_panic_nor_log_in(
        messages in prop::collection::vec(hostile(), 4),
        channel in channels(),
    ) {
        let keys = Keys::derive(b"pencil", SALT, 1);
        let mut plain = server(b"pencil", channel.clone());
        let _ = plain.client_first(&messages[0]);
        prop_assert!(plain.client_final(&messages[1]).is_err());
        let mut later = server(b"pencil", ChannelBinding::Unavailable);
        later.client_first(&client(&ChannelBinding::Unavailable).first()).unwrap();
        prop_assert!(later.client_final(&messages[2]).is_err());

        let mut ours = client(&channel);
        let _ = ours.server_first(&messages[1], MAX_ITERATIONS);
        let _ = ours.client_final(&keys);
        prop_assert!(ours.server_final(&messages[3]).is_err());
        for message in &messages {
            if let Ok(text) = std::str::from_utf8(message) {
                let _ = Verifier::parse(text);
                let _ = Verifier::parse(&format!("SCRAM-SHA-256${text}"));
            }
        }
    }

    #[test]
    fn a_text_stays_a_text_and_never_becomes_empty(text in "\\PC{0,20}") {
        let once = password::prepare(text.as_bytes()).into_owned();
        prop_assert!(std::str::from_utf8(&once).is_ok());
        prop_assert!(text.is_empty() == once.is_empty());
    }
}
