//! First packets.

use pgweir_proto::encode;
use pgweir_proto::startup::{CANCEL_REQUEST, First, MAX_STARTUP, first_len};

/// A packet with its length word, and whatever is behind it.
pub fn startup(input: &[u8]) {
    let declared = input.first_chunk::<4>().map(|word| u32::from_be_bytes(*word));
    match (first_len(input), declared) {
        (Ok(None), None) => {}
        (Ok(Some(len)), Some(declared)) => {
            assert!(len == declared as usize && (8..=MAX_STARTUP).contains(&declared));
            if let Some(packet) = input.get(4..len) {
                body(packet);
            }
        }
        (Err(_), Some(declared)) => assert!(!(8..=MAX_STARTUP).contains(&declared)),
        (got, declared) => panic!("{got:?} for {declared:?}"),
    }
    // The same bytes as a packet of their own, so that no length has to be guessed.
    body(input);
}

fn body(body: &[u8]) {
    let mut again = Vec::new();
    let code = body.first_chunk::<4>().map(|word| u32::from_be_bytes(*word));
    match First::parse(body) {
        Ok(First::Startup(startup)) => {
            assert_eq!(code.map(|code| code >> 16), Some(3));
            let version = 3 << 16 | u32::from(startup.minor);
            encode::startup(&mut again, version, startup.params());
            assert_eq!(&again[4..], body);
            for (name, _) in startup.params().take(4) {
                let last = startup.params().filter(|(other, _)| *other == name).last().map(|(_, value)| value);
                if let Ok(name) = std::str::from_utf8(name) {
                    assert_eq!(startup.get(name), last);
                }
            }
        }
        Ok(First::Cancel { pid, secret }) => {
            assert_eq!(code, Some(CANCEL_REQUEST));
            encode::cancel_request(&mut again, pid, secret);
            assert!(again[4..] == *body && (4..=256).contains(&secret.len()));
        }
        Ok(First::Ssl) => assert_eq!(body[..4], encode::SSL_REQUEST[4..]),
        Ok(First::GssEnc) => assert_eq!(body[..4], [0x04, 0xd2, 0x16, 0x30]),
        Err(_) => {}
    }
}
