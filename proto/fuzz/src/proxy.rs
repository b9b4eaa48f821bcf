//! What a proxy sends ahead of a connection.

use std::net::IpAddr;

use pgweir_proto::proxy::{Origin, V1_MAX, V2_REST_MAX, parse};

use crate::Source;

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and transport, length.
const FIXED: usize = 16;

/// How the header begins, so that no signature has to be guessed; then its bytes.
pub fn proxy(input: &[u8]) {
    let mut source = Source::new(input);
    let bytes = match source.below(4) {
        0 => source.rest().to_vec(),
        1 => [b"PROXY TCP", source.rest()].concat(),
        2 => [b"PROXY UNKNOWN", source.rest()].concat(),
        _ => {
            // A length that fits most of the time.
            let (command, kind, wrong) = (source.byte(), source.byte(), source.byte());
            let body = source.rest();
            let declared = u16::try_from(body.len()).unwrap_or(u16::MAX).wrapping_add(u16::from(wrong / 250));
            [SIGNATURE, &[command, kind], &declared.to_be_bytes(), body].concat()
        }
    };
    header(&bytes);
}

/// One verdict, however the bytes arrive, which no further bytes change; and what is accepted says what a naive reader
/// finds.
fn header(bytes: &[u8]) {
    let whole = parse(bytes);
    let most = V1_MAX.max(FIXED + V2_REST_MAX);
    for end in 0..bytes.len().min(most + 1) {
        let verdict = parse(&bytes[..end]);
        let behind = matches!(whole, Ok(Some((len, _))) if end >= len);
        assert!(verdict == whole || (verdict == Ok(None) && !behind), "{verdict:?} at {end}, then {whole:?}");
    }
    match whole {
        Ok(None) => assert!(bytes.len() < most, "more is awaited behind {} bytes", bytes.len()),
        Ok(Some((len, origin))) => {
            assert!(len <= bytes.len() && len <= most);
            let head = &bytes[..len];
            let found = if head.starts_with(SIGNATURE) { binary(head) } else { line(head) };
            assert_eq!(found, Some(origin));
        }
        Err(_) => {}
    }
}

/// A header of version 1, whole.
fn line(head: &[u8]) -> Option<Origin> {
    assert!(head.len() <= V1_MAX);
    let text = std::str::from_utf8(head).ok()?.strip_suffix("\r\n")?;
    assert!(!text.contains('\n'));
    let words: Vec<&str> = text.split(' ').collect();
    if words.get(1) == Some(&"UNKNOWN") {
        return (words[0] == "PROXY").then_some(Origin::Socket);
    }
    let [proxy, family, source, destination, port, other] = words[..] else { return None };
    let addresses: [IpAddr; 2] = [source.parse().ok()?, destination.parse().ok()?];
    let ports: [u16; 2] = [port.parse().ok()?, other.parse().ok()?];
    let fits = addresses.iter().all(|address| address.is_ipv4() == (family == "TCP4"));
    let written = [port, other] == ports.map(|port| port.to_string());
    let known = proxy == "PROXY" && (family == "TCP4" || family == "TCP6");
    (fits && written && known).then(|| Origin::Tcp((addresses[0], ports[0]).into()))
}

/// A header of version 2, whole.
fn binary(head: &[u8]) -> Option<Origin> {
    let (fixed, body) = head.split_at(FIXED);
    assert_eq!(body.len(), usize::from(u16::from_be_bytes([fixed[14], fixed[15]])));
    assert!(body.len() <= V2_REST_MAX);
    let port = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
    match (fixed[12], fixed[13]) {
        (0x20, _) | (0x21, 0x00..=0x02 | 0x10 | 0x12 | 0x20 | 0x22 | 0x30 | 0x32) => Some(Origin::Socket),
        (0x21, 0x11) => {
            let address: [u8; 4] = body[..4].try_into().ok()?;
            Some(Origin::Tcp((address, port(8)).into()))
        }
        (0x21, 0x21) => {
            let address: [u8; 16] = body[..16].try_into().ok()?;
            Some(Origin::Tcp((address, port(32)).into()))
        }
        (0x21, 0x31) => (body.len() >= 216).then_some(Origin::Unix),
        _ => None,
    }
}
