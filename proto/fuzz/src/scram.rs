//! SCRAM, in both roles.

use std::cell::Cell;
use std::sync::LazyLock;

use pgweir_proto::scram::{ChannelBinding, ClientExchange, Keys, MESSAGE_LIMIT, NONCE_BYTES, ServerExchange, Verifier};

use crate::Source;

const SALT: &[u8] = b"0123456789abcdef";
const ITERATIONS: u32 = 2;
const NONCES: [[u8; NONCE_BYTES]; 2] = [[7; NONCE_BYTES], [9; NONCE_BYTES]];

static KEYS: LazyLock<(Keys, Verifier)> = LazyLock::new(|| {
    let keys = Keys::derive(b"pencil", SALT, ITERATIONS);
    let verifier = keys.verifier(SALT, ITERATIONS);
    (keys, verifier)
});

/// Which role is played by the input, and how; then what it says.
pub fn scram(input: &[u8]) {
    let mut source = Source::new(input);
    match source.below(4) {
        0 => against_server(&mut source),
        1 => against_client(&mut source),
        2 => between(&mut source),
        _ => texts(&mut source),
    }
}

fn binding(choice: usize) -> ChannelBinding {
    match choice {
        0 => ChannelBinding::Unavailable,
        1 => ChannelBinding::Unused,
        _ => ChannelBinding::EndPoint(b"the hash of a certificate".to_vec()),
    }
}

/// A client that does not know the password. `{}` in its last message is the nonce agreed upon.
fn against_server(source: &mut Source<'_>) {
    let mut server = ServerExchange::new(KEYS.1.clone(), NONCES[1], binding(source.below(3)));
    let first = server.client_first(source.stretch());
    let last = source.rest();
    if let Ok(first) = &first {
        assert!(first.len() < 2 * MESSAGE_LIMIT && first.starts_with(b"r="));
    }
    let nonce = first.iter().flat_map(|first| first.split(|byte| *byte == b',')).next().unwrap_or_default();
    let last = match last.windows(2).position(|window| window == b"{}") {
        Some(at) => [&last[..at], nonce.get(2..).unwrap_or_default(), &last[at + 2..]].concat(),
        None => last.to_vec(),
    };
    assert!(server.client_final(&last).is_err(), "let in without the password");
    assert!(server.client_first(b"n,,n=,r=abc").is_err() && server.client_final(&last).is_err());
}

/// A server that does not know the password. `{}` in its first message is the client's nonce.
fn against_client(source: &mut Source<'_>) {
    let mut client = ClientExchange::new(NONCES[0], &binding(source.below(3)));
    let said = client.first();
    let nonce = said.windows(2).rposition(|window| window == b"r=").map_or(&[][..], |at| &said[at + 2..]);
    let first = source.stretch();
    let first = match first.windows(2).position(|window| window == b"{}") {
        Some(at) => [&first[..at], nonce, &first[at + 2..]].concat(),
        None => first.to_vec(),
    };
    match client.server_first(&first, 4096) {
        Ok(challenge) => {
            assert!((1..=4096).contains(&challenge.iterations) && (1..=1024).contains(&challenge.salt.len()));
            let last = client.client_final(&KEYS.0).expect("its turn");
            assert!(last.len() < 2 * MESSAGE_LIMIT);
        }
        Err(_) => assert!(client.client_final(&KEYS.0).is_err()),
    }
    assert!(client.server_final(source.rest()).is_err(), "a server without the keys is believed");
}

/// Two honest parties, and someone between them who changes bytes of one message.
fn between(source: &mut Source<'_>) {
    let channel = binding(source.below(3));
    let mut server = ServerExchange::new(KEYS.1.clone(), NONCES[1], channel.clone());
    let mut client = ClientExchange::new(NONCES[0], &channel);
    let which = source.below(4);
    let changed = Cell::new(false);
    let mut pass = |nth: usize, message: Vec<u8>| {
        if nth != which {
            return message;
        }
        let after = change(message.clone(), source);
        changed.set(after != message);
        after
    };
    // What one party refuses is where it ends.
    let verified = (|| {
        let first = server.client_first(&pass(0, client.first())).ok()?;
        client.server_first(&pass(1, first), 4096).ok()?;
        let last = client.client_final(&KEYS.0).expect("its turn");
        server.client_final(&pass(2, last)).ok()
    })();
    let Some(verified) = verified else {
        assert!(changed.get() || channel == ChannelBinding::Unused, "two honest parties do not agree");
        return;
    };
    assert!(!changed.get(), "message {which} was changed, and the client was let in");
    let signed = verified.server_final.clone();
    let heard = pass(3, verified.server_final);
    let believed = client.server_final(&heard).is_ok();
    // What follows the signature are extensions, which mean nothing.
    let honest = heard == signed || heard.starts_with(&[&signed[..], b","].concat());
    assert!(believed <= honest && (believed || changed.get()));
}

fn change(mut message: Vec<u8>, source: &mut Source<'_>) -> Vec<u8> {
    for _ in 0..source.below(4) {
        let at = usize::from(source.byte()) % message.len().max(1);
        match source.below(5) {
            0 => message[at] = source.byte(),
            1 => message.truncate(at.max(1)),
            2 => drop(message.splice(at..at, [source.byte()])),
            3 if message.len() > 1 => drop(message.remove(at)),
            _ => {
                let more = source.stretch();
                message.extend_from_slice(more);
            }
        }
    }
    message
}

/// Verifiers and passwords.
fn texts(source: &mut Source<'_>) {
    let password = source.stretch();
    let made = Verifier::derive(password, SALT, 1);
    assert!(made.matches_password(password));
    if let Ok(text) = std::str::from_utf8(source.rest())
        && let Ok(read) = Verifier::parse(text)
    {
        assert_eq!(Verifier::parse(&read.encode()), Ok(read));
    }
}
