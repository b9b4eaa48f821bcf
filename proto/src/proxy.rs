//! The PROXY protocol, versions 1 and 2: what a proxy sends ahead of a connection, to say whose it is.
//!
//! Source: `HAProxy`'s `proxy-protocol.txt`, sections 2.1 (version 1, a line of text) and 2.2 (version 2, binary).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::malformed::u16_be;

/// The longest header of version 1 in bytes, its CR LF included. Source: section 2.1.
pub const V1_MAX: usize = 107;

/// The most bytes accepted behind the fixed part of a header of version 2: addresses and extensions.
pub const V2_REST_MAX: usize = 4096;

const V1_PREFIX: &[u8] = b"PROXY ";
const V2_SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and transport, length.
const V2_FIXED: usize = 16;

/// Whose connection it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// This client's.
    Tcp(SocketAddr),
    /// Of a client on the proxy's own machine.
    Unix,
    /// The proxy's own (a health check), or it does not know: what the socket says counts.
    Socket,
}

/// Why bytes are no PROXY header; the stream is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyFault {
    /// They begin like neither version.
    #[error("no PROXY header")]
    Absent,
    /// No end within the limit; bytes.
    #[error("the PROXY header has more than {limit} bytes")]
    TooLong {
        /// The limit that applies.
        limit: usize,
    },
    /// A part is not what it has to be.
    #[error("the PROXY header's {field} is malformed")]
    Malformed {
        /// The part, in the specification's words.
        field: &'static str,
    },
}

/// Reads the header at the front of `input`: its length, and whose connection it is. None while it is incomplete.
/// Looks at no byte behind it.
///
/// # Errors
///
/// [`ProxyFault`], as soon as no further bytes could make it a header.
pub fn parse(input: &[u8]) -> Result<Option<(usize, Origin)>, ProxyFault> {
    if begins(input, V1_PREFIX) {
        v1(input)
    } else if begins(input, V2_SIGNATURE) {
        v2(input)
    } else {
        Err(ProxyFault::Absent)
    }
}

/// Whether `input` begins with `prefix`, as far as it goes.
fn begins(input: &[u8], prefix: &[u8]) -> bool {
    input.iter().zip(prefix).all(|(a, b)| a == b)
}

fn v1(input: &[u8]) -> Result<Option<(usize, Origin)>, ProxyFault> {
    let within = input.get(..V1_MAX).unwrap_or(input);
    let Some(end) = memchr::memchr(b'\n', within) else {
        let limit = V1_MAX;
        return if within.len() < V1_MAX { Ok(None) } else { Err(ProxyFault::TooLong { limit }) };
    };
    let fault = |field| ProxyFault::Malformed { field };
    let line = within.get(..end).and_then(|line| line.strip_suffix(b"\r")).ok_or(fault("end of line"))?;
    let words = line.strip_prefix(V1_PREFIX).ok_or(ProxyFault::Absent)?;
    let text = std::str::from_utf8(words).map_err(|_| fault("text"))?;
    let mut words = text.split(' ');
    let origin = match words.next() {
        // What follows may be anything.
        Some("UNKNOWN") => Origin::Socket,
        Some(family @ ("TCP4" | "TCP6")) => {
            let mut address = |field| words.next().and_then(|word| ip(family, word)).ok_or(fault(field));
            let source = address("source address")?;
            address("destination address")?;
            let mut port = |field| words.next().and_then(number).ok_or(fault(field));
            let source = SocketAddr::new(source, port("source port")?);
            port("destination port")?;
            if words.next().is_some() {
                return Err(fault("end of line"));
            }
            Origin::Tcp(source)
        }
        _ => return Err(fault("protocol")),
    };
    Ok(Some((end + 1, origin)))
}

fn ip(family: &str, word: &str) -> Option<IpAddr> {
    match family {
        "TCP4" => word.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        _ => word.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
    }
}

/// A port: digits alone, and no zero in front.
fn number(word: &str) -> Option<u16> {
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    let canonical = digits && (word == "0" || !word.starts_with('0'));
    word.parse().ok().filter(|_| canonical)
}

fn v2(input: &[u8]) -> Result<Option<(usize, Origin)>, ProxyFault> {
    let fault = |field| ProxyFault::Malformed { field };
    let mut fixed = input.get(V2_SIGNATURE.len()..).unwrap_or_default().iter();
    // Each is judged as soon as it is there.
    let Some(command) = fixed.next() else { return Ok(None) };
    if command >> 4 != 2 {
        return Err(fault("version"));
    }
    let is_local = match command & 0x0f {
        0 => true,
        1 => false,
        _ => return Err(fault("command")),
    };
    let Some(kind) = fixed.next() else { return Ok(None) };
    let Ok((rest, _)) = u16_be(fixed.as_slice(), "") else { return Ok(None) };
    let rest = usize::from(rest);
    if rest > V2_REST_MAX {
        return Err(ProxyFault::TooLong { limit: V2_FIXED + V2_REST_MAX });
    }
    let length = V2_FIXED + rest;
    let Some(body) = input.get(V2_FIXED..length) else { return Ok(None) };
    let origin = if is_local { Origin::Socket } else { v2_origin(*kind, body)? };
    Ok(Some((length, origin)))
}

/// Extensions (TLVs) follow the addresses; none of them matters here.
fn v2_origin(kind: u8, body: &[u8]) -> Result<Origin, ProxyFault> {
    let fault = |field| ProxyFault::Malformed { field };
    let (family, transport) = (kind >> 4, kind & 0x0f);
    if family > 3 {
        return Err(fault("address family"));
    }
    if transport > 2 {
        return Err(fault("transport protocol"));
    }
    // Addresses of a length, twice, then two ports.
    let port = |at: usize| body.get(at..).and_then(|rest| rest.first_chunk()).map(|port| u16::from_be_bytes(*port));
    let source = match family {
        1 => body.first_chunk::<12>().and_then(|block| Some((block.first_chunk::<4>().copied()?.into(), port(8)?))),
        2 => body.first_chunk::<36>().and_then(|block| Some((block.first_chunk::<16>().copied()?.into(), port(32)?))),
        3 if body.len() >= 216 => return Ok(if transport == 1 { Origin::Unix } else { Origin::Socket }),
        0 => return Ok(Origin::Socket),
        _ => None,
    };
    let (address, port): (IpAddr, u16) = source.ok_or(fault("address block"))?;
    // Of a datagram or of a transport that the proxy does not know: no client of ours has such an address.
    Ok(if transport == 1 { Origin::Tcp(SocketAddr::new(address, port)) } else { Origin::Socket })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v2_header(command: u8, kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [V2_SIGNATURE, &[command, kind], &length, body].concat()
    }

    fn tcp(text: &str) -> Origin {
        Origin::Tcp(text.parse().unwrap())
    }

    const FAULT: fn(&'static str) -> ProxyFault = |field| ProxyFault::Malformed { field };
    const V4: &[u8] = &[192, 0, 2, 1, 10, 0, 0, 1, 0x30, 0x39, 0x19, 0x20];

    #[test]
    fn headers_of_version_1_are_read_exactly() {
        let long = format!("PROXY UNKNOWN {}\r\n", "f".repeat(91));
        let longer = format!("PROXY UNKNOWN {}\r\n", "f".repeat(92));
        let widest = format!("PROXY TCP6 {0} {0} 65535 65535\r\n", ["ffff"; 8].join(":"));
        let highest = format!("[{}]:65535", ["ffff"; 8].join(":"));
        #[rustfmt::skip]
        let table: Vec<(&str, &str, Result<Origin, ProxyFault>)> = vec![
            ("IPv4",             "PROXY TCP4 192.0.2.1 10.0.0.1 12345 6432\r\n",     Ok(tcp("192.0.2.1:12345"))),
            ("IPv6",             "PROXY TCP6 2001:db8::1 ::1 1 0\r\n",               Ok(tcp("[2001:db8::1]:1"))),
            ("widest",           &widest,                                            Ok(tcp(&highest))),
            ("unknown",          "PROXY UNKNOWN\r\n",                                Ok(Origin::Socket)),
            ("unknown, more",    "PROXY UNKNOWN ::1 ::1 1 1\r\n",                    Ok(Origin::Socket)),
            ("longest",          &long,                                              Ok(Origin::Socket)),
            ("too long",         &longer,                                            Err(ProxyFault::TooLong { limit: 107 })),
            ("other protocol",   "PROXY UDP4 192.0.2.1 10.0.0.1 1 2\r\n",            Err(FAULT("protocol"))),
            ("no protocol",      "PROXY \r\n",                                       Err(FAULT("protocol"))),
            ("lower case",       "proxy TCP4 192.0.2.1 10.0.0.1 1 2\r\n",            Err(ProxyFault::Absent)),
            ("families mixed",   "PROXY TCP4 ::1 10.0.0.1 1 2\r\n",                  Err(FAULT("source address"))),
            ("zeros in front",   "PROXY TCP4 192.0.02.1 10.0.0.1 1 2\r\n",           Err(FAULT("source address"))),
            ("no destination",   "PROXY TCP4 192.0.2.1\r\n",                         Err(FAULT("destination address"))),
            ("port too large",   "PROXY TCP4 192.0.2.1 10.0.0.1 65536 2\r\n",        Err(FAULT("source port"))),
            ("port with a sign", "PROXY TCP4 192.0.2.1 10.0.0.1 +1 2\r\n",           Err(FAULT("source port"))),
            ("port with a zero", "PROXY TCP4 192.0.2.1 10.0.0.1 1 02\r\n",           Err(FAULT("destination port"))),
            ("one more word",    "PROXY TCP4 192.0.2.1 10.0.0.1 1 2 3\r\n",          Err(FAULT("end of line"))),
            ("two spaces",       "PROXY TCP4  192.0.2.1 10.0.0.1 1 2\r\n",           Err(FAULT("source address"))),
            ("LF alone",         "PROXY TCP4 192.0.2.1 10.0.0.1 1 2\n",              Err(FAULT("end of line"))),
            ("not text",         "PROXY \u{fffd}\r\n",                               Err(FAULT("protocol"))),
            ("a startup packet", "\0\0\0\x08\x04\u{16}",                             Err(ProxyFault::Absent)),
        ];
        for (name, text, want) in table {
            let want = want.map(|origin| Some((text.len(), origin)));
            assert_eq!(parse(text.as_bytes()), want, "{name}");
            if want.is_ok() {
                assert_eq!(parse(format!("{text}PROXY").as_bytes()), want, "{name}, with more behind it");
            }
        }
    }

    #[test]
    fn headers_of_version_2_are_read_exactly() {
        let v6 = [&[0x20, 1, 0x0d, 0xb8][..], &[0; 11], &[1], &[0; 16], &[0x30, 0x39], &[0x19, 0x20]].concat();
        // An extension of type 4 (NOOP) with three bytes.
        let extended = [V4, &[4, 0, 3, 1, 2, 3]].concat();
        let most = [V4, &[0; V2_REST_MAX - 12]].concat();
        #[rustfmt::skip]
        let table: Vec<(&str, Vec<u8>, Result<Origin, ProxyFault>)> = vec![
            ("IPv4",                  v2_header(0x21, 0x11, V4),          Ok(tcp("192.0.2.1:12345"))),
            ("IPv4, extended",        v2_header(0x21, 0x11, &extended),   Ok(tcp("192.0.2.1:12345"))),
            ("IPv4, longest",         v2_header(0x21, 0x11, &most),       Ok(tcp("192.0.2.1:12345"))),
            ("IPv6",                  v2_header(0x21, 0x21, &v6),         Ok(tcp("[2001:db8::1]:12345"))),
            ("unix",                  v2_header(0x21, 0x31, &[0; 216]),   Ok(Origin::Unix)),
            ("datagrams",             v2_header(0x21, 0x12, V4),          Ok(Origin::Socket)),
            ("unknown transport",     v2_header(0x21, 0x10, V4),          Ok(Origin::Socket)),
            ("unknown",               v2_header(0x21, 0x00, b""),         Ok(Origin::Socket)),
            ("unknown, with bytes",   v2_header(0x21, 0x00, b"xyz"),      Ok(Origin::Socket)),
            ("local",                 v2_header(0x20, 0x00, b""),         Ok(Origin::Socket)),
            ("local, with addresses", v2_header(0x20, 0x11, V4),          Ok(Origin::Socket)),
            ("local, any family",     v2_header(0x20, 0xff, b""),         Ok(Origin::Socket)),
            ("version 1 in binary",   v2_header(0x11, 0x11, V4),          Err(FAULT("version"))),
            ("version 3",             v2_header(0x31, 0x11, V4),          Err(FAULT("version"))),
            ("another command",       v2_header(0x22, 0x11, V4),          Err(FAULT("command"))),
            ("another family",        v2_header(0x21, 0x41, V4),          Err(FAULT("address family"))),
            ("another transport",     v2_header(0x21, 0x13, V4),          Err(FAULT("transport protocol"))),
            ("IPv4, cut",             v2_header(0x21, 0x11, &V4[..11]),   Err(FAULT("address block"))),
            ("IPv6, cut",             v2_header(0x21, 0x21, &v6[..35]),   Err(FAULT("address block"))),
            ("unix, cut",             v2_header(0x21, 0x31, &[0; 215]),   Err(FAULT("address block"))),
            ("too long",              v2_header(0x21, 0x11, &[0; V2_REST_MAX + 1]), Err(ProxyFault::TooLong { limit: 4112 })),
        ];
        for (name, bytes, want) in table {
            let want = want.map(|origin| Some((bytes.len(), origin)));
            assert_eq!(parse(&bytes), want, "{name}");
            if want.is_ok() {
                assert_eq!(parse(&[&bytes[..], b"\0\0\0\x08"].concat()), want, "{name}, with more behind it");
            }
        }
    }

    fn header() -> impl Strategy<Value = Vec<u8>> {
        let v1 =
            (any::<Ipv4Addr>(), any::<Ipv6Addr>(), any::<u16>(), any::<bool>()).prop_map(|(v4, v6, port, four)| {
                let text = if four {
                    format!("PROXY TCP4 {v4} {v4} {port} {port}\r\n")
                } else {
                    format!("PROXY TCP6 {v6} {v6} {port} {port}\r\n")
                };
                text.into_bytes()
            });
        let v2 = (0x20..0x23_u8, any::<u8>(), prop::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(command, kind, body)| v2_header(command, kind, &body));
        prop_oneof![v1, v2]
    }

    proptest! {
        /// However the bytes arrive: incomplete, then one verdict, which further bytes do not change.
        #[test]
        fn the_verdict_does_not_depend_on_the_chunks(header in header(), damage in any::<Option<(u16, u8)>>(),
                                                     behind in prop::collection::vec(any::<u8>(), 0..20)) {
            let mut bytes = header;
            if let Some((at, with)) = damage {
                let at = usize::from(at) % bytes.len();
                bytes[at] = with;
            }
            bytes.extend(behind);
            let whole = parse(&bytes);
            let first = (0..=bytes.len()).map(|end| parse(&bytes[..end])).find(|verdict| *verdict != Ok(None));
            prop_assert_eq!(first.unwrap_or(Ok(None)), whole);
            if let Ok(Some((length, _))) = whole {
                prop_assert_eq!(parse(&bytes[..length]), whole);
                prop_assert_eq!(parse(&bytes[..length - 1]), Ok(None));
            }
        }

        #[test]
        fn no_bytes_panic_and_none_are_awaited_without_end(bytes in prop::collection::vec(any::<u8>(), 0..64),
                                                           version in any::<bool>()) {
            let _ = parse(&bytes);
            let mut bytes = [if version { V1_PREFIX } else { V2_SIGNATURE }, &bytes].concat();
            let _ = parse(&bytes);
            bytes.resize(V2_FIXED + V2_REST_MAX, 0x20);
            prop_assert_ne!(parse(&bytes), Ok(None));
        }
    }
}
