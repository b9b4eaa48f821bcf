//! Networks, as a list of addresses with their prefix lengths.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use crate::fault::Problem;
use crate::setting::Bounds;
use crate::socket::listed;
use crate::typed::{Kind, Raw, Typed, mistyped};

/// A network: an address, and how many of its leading bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    /// `10.0.0.0/8`, `2001:db8::/32`, or one address. Bits behind the prefix must be 0: they would be a mistake.
    fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            Some(prefix) if prefix.bytes().all(|byte| byte.is_ascii_digit()) => prefix.parse().ok()?,
            Some(_) => return None,
            None => width,
        };
        let network = Self { address, prefix };
        (prefix <= width && masked(address, prefix) == bits(address)).then_some(network)
    }

    fn contains(&self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4() && masked(address, self.prefix) == bits(self.address)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// The address at the top of 128 bits.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
        IpAddr::V6(address) => Ipv6Addr::to_bits(address),
    }
}

fn masked(address: IpAddr, prefix: u8) -> u128 {
    let behind = 128_u32.saturating_sub(u32::from(prefix));
    bits(address) & u128::MAX.checked_shl(behind).unwrap_or(0)
}

/// Networks; none by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks(Vec<Network>);

impl Networks {
    /// Whether `address` lies in one of them. An IPv4 address mapped to IPv6 is that IPv4 address.
    #[must_use]
    pub fn contain(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(address.to_canonical()))
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Typed for Networks {
    const KIND: Kind = Kind::Text;

    fn read(raw: &Raw<'_>, _: Option<Bounds>) -> Result<Self, Problem> {
        let (Raw::Word(text) | Raw::Text(text)) = raw else {
            return Err(mistyped(Self::KIND, raw));
        };
        let wanted = "a list of networks such as 10.0.0.0/8 or 2001:db8::/32 separated by commas, nor empty";
        let networks = listed(text).map(|item| Network::parse(item).ok_or(Problem::NotAnAddress { wanted }));
        networks.collect::<Result<_, _>>().map(Self)
    }

    fn show(&self) -> String {
        self.0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_their_addresses_and_no_others() {
        #[rustfmt::skip]
        let table: [(&str, &str, Option<bool>); 16] = [
            ("10.0.0.0/8",            "10.255.0.1",        Some(true)),
            ("10.0.0.0/8",            "11.0.0.1",          Some(false)),
            ("10.0.0.0/8",            "::ffff:10.0.0.1",   Some(true)),
            ("192.0.2.1",             "192.0.2.1",         Some(true)),
            ("192.0.2.1",             "192.0.2.2",         Some(false)),
            ("0.0.0.0/0",             "203.0.113.9",       Some(true)),
            ("0.0.0.0/0",             "::1",               Some(false)),
            ("::/0",                  "2001:db8::1",       Some(true)),
            ("::/0",                  "192.0.2.1",         Some(false)),
            ("2001:db8::/33, ::1",    "::1",               Some(true)),
            ("2001:db8::/33, ::1",    "2001:db8:8000::1",  Some(false)),
            ("",                      "192.0.2.1",         Some(false)),
            ("10.0.0.1/8",            "",                  None),
            ("10.0.0.0/33",           "",                  None),
            ("10.0.0.0/+8",           "",                  None),
            ("10.0.0.0/8,",           "",                  None),
        ];
        for (text, address, want) in table {
            let networks = Networks::read(&Raw::Word(text), None).ok();
            assert_eq!(networks.map(|networks| networks.contain(address.parse().unwrap())), want, "{text}: {address}");
        }
    }
}
