//! Who may ask what over HTTP.
//!
//! With `http_token`, whoever shows it. Without, whoever reaches the loopback address, by its own name: a web page that a
//! browser on this machine shows could otherwise have its own name lead here (DNS rebinding), and read everything.

use std::net::IpAddr;

use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, Uri, header};
use pgweir_config::Secret;
use subtle::ConstantTimeEq;

/// What `HireFire` sends its token in.
const HIREFIRE_TOKEN: &str = "hirefire-token";

/// What tells nothing of what goes on here: the page (its figures are asked for by itself), and the form of an answer.
const OPEN: [&str; 4] = ["/", "/dashboard.css", "/dashboard.js", "/limits/schema"];

/// What says yes or no to everybody, and why only to whoever may ask: load balancers and platforms send no tokens.
const YES_OR_NO: [&str; 2] = ["/healthz", "/readyz"];

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is answered.
    Whole,
    /// It is answered with yes or no.
    YesOrNo,
    /// 401: it has no token, or a wrong one.
    NoToken,
    /// 421: it is meant for another host.
    OtherHost,
}

/// Stands in front of the endpoints.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    token: Option<Secret>,
}

impl Gate {
    /// With `http_token`, if there is one.
    #[must_use]
    pub fn new(token: Option<Secret>) -> Self {
        Self { token }
    }

    /// What becomes of a request.
    #[must_use]
    pub fn judge(&self, uri: &Uri, headers: &HeaderMap) -> Verdict {
        let path = uri.path();
        let Some(token) = &self.token else {
            let host = headers.get(header::HOST).map(|host| host.to_str().unwrap_or("?"));
            let hosts = [host, uri.authority().map(Authority::as_str)];
            let well = hosts.into_iter().flatten().all(is_loopback);
            return if well { Verdict::Whole } else { Verdict::OtherHost };
        };
        let given = |name: &str| headers.get(name).map(HeaderValue::as_bytes);
        let bearer = given("authorization").and_then(bearer);
        let hirefire = given(HIREFIRE_TOKEN).filter(|_| path == "/hirefire");
        let is_right = |given: &[u8]| bool::from(token.expose().as_bytes().ct_eq(given));
        if OPEN.contains(&path) || bearer.or(hirefire).is_some_and(is_right) {
            Verdict::Whole
        } else if YES_OR_NO.contains(&path) {
            Verdict::YesOrNo
        } else {
            Verdict::NoToken
        }
    }
}

/// The token of an `Authorization: Bearer`.
///
/// Source: RFC 6750 §2.1, RFC 9110 §11.1 (the scheme's case does not matter).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

/// Whether a `Host` is this machine's own name, with or without a port.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(address, _)| address),
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn without_a_token_only_requests_for_this_machine_are_answered() {
        let gate = Gate::default();
        #[rustfmt::skip]
        let table = [
            ("127.0.0.1:9127", true), ("127.0.0.1", true), ("localhost:9127", true), ("LOCALHOST", true),
            ("[::1]:9127", true), ("[::1]", true), ("127.8.8.8:1", true), ("[::ffff:127.0.0.1]:1", true),
            ("evil.example:9127", false), ("localhost.evil.example", false), ("127.0.0.1.evil.example:9127", false),
            ("10.0.0.1:9127", false), ("", false), ("[", false), ("[::1", false), ("::1", false), ("0", false),
            ("127.0.0.1@evil.example", false),
        ];
        for (host, well) in table {
            let want = if well { Verdict::Whole } else { Verdict::OtherHost };
            for path in ["/metrics", "/", "/healthz"] {
                assert_eq!(gate.judge(&path.parse().unwrap(), &headers(&[("host", host)])), want, "{host} {path}");
            }
        }
        assert_eq!(gate.judge(&"/".parse().unwrap(), &HeaderMap::new()), Verdict::Whole, "HTTP/1.0 names no host");
        let absolute = "http://evil.example/metrics".parse().unwrap();
        assert_eq!(gate.judge(&absolute, &headers(&[("host", "localhost")])), Verdict::OtherHost);
    }

    #[test]
    fn with_a_token_whoever_shows_it_is_answered_from_everywhere() {
        const TOKEN: &str = "0123456789abcdef";
        let gate = Gate::new(Some(Secret::new(TOKEN)));
        #[rustfmt::skip]
        let table: [(&str, &[(&str, &str)], Verdict); 14] = [
            ("/limits",       &[("authorization", "Bearer 0123456789abcdef"), ("host", "pod:9127")], Verdict::Whole),
            ("/limits",       &[("authorization", "bearer  0123456789abcdef")],  Verdict::Whole),
            ("/limits",       &[],                                               Verdict::NoToken),
            ("/limits",       &[("authorization", "Bearer 0123456789abcdee")],   Verdict::NoToken),
            ("/limits",       &[("authorization", "Bearer 0123456789abcdef0")],  Verdict::NoToken),
            ("/limits",       &[("authorization", "Bearer ")],                   Verdict::NoToken),
            ("/limits",       &[("authorization", "Basic 0123456789abcdef")],    Verdict::NoToken),
            ("/limits",       &[("hirefire-token", "0123456789abcdef")],         Verdict::NoToken),
            ("/hirefire",     &[("hirefire-token", "0123456789abcdef")],         Verdict::Whole),
            ("/metrics",      &[("host", "localhost")],                          Verdict::NoToken),
            ("/readyz",       &[],                                               Verdict::YesOrNo),
            ("/readyz",       &[("authorization", "Bearer 0123456789abcdef")],   Verdict::Whole),
            ("/",             &[],                                               Verdict::Whole),
            ("/nowhere",      &[],                                               Verdict::NoToken),
        ];
        for (path, lines, want) in table {
            let lines: Vec<(&'static str, &'static str)> = lines.to_vec();
            assert_eq!(gate.judge(&path.parse().unwrap(), &headers(&lines)), want, "{path} {lines:?}");
        }
        assert!(!format!("{gate:?}").contains(TOKEN));
    }
}
