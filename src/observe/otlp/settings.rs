//! The variables of OpenTelemetry.

use std::time::Duration;

use pgweir_config::Secret;

/// Where nothing else is said: once a minute, and ten seconds for it.
const PERIOD: Duration = Duration::from_mins(1);
const TIMEOUT: Duration = Duration::from_secs(10);

/// The shortest and the longest period that is taken.
const PERIODS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_hours(24));

/// How a message is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// `http/json`.
    Json,
    /// `http/protobuf`, the default.
    Protobuf,
}

/// Where metrics go, and how.
#[derive(Clone, Debug)]
pub struct Target {
    /// Whether it is reached by TLS.
    pub(super) tls: bool,
    pub(super) host: String,
    pub(super) port: u16,
    /// The path, with its query.
    path: Secret,
    /// Further headers, which may hold secrets.
    headers: Vec<(String, Secret)>,
    pub(super) protocol: Protocol,
    pub(super) period: Duration,
    pub(super) timeout: Duration,
    /// A file of authorities for TLS; without, those of the system.
    pub(super) authorities: Option<String>,
    attributes: Vec<(String, String)>,
}

/// What is wrong with the variables: which, and how to mend it. One line, without a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {problem}: no metrics are sent by OTLP")]
pub struct Fault {
    name: &'static str,
    problem: &'static str,
}

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const METRICS_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT";

impl Target {
    /// What the environment says; none if it names no receiver or switches it off.
    ///
    /// # Errors
    ///
    /// The first variable that cannot be understood.
    pub fn of(variables: &[(String, String)]) -> Result<Option<Self>, Fault> {
        // An empty one is as good as none.
        let get = |name: &str| {
            variables.iter().find(|(known, value)| known == name && !value.is_empty()).map(|(_, value)| value.trim())
        };
        let either = |own: &'static str, general: &'static str| {
            get(own).map(|value| (own, value)).or_else(|| get(general).map(|value| (general, value)))
        };
        let off = get("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
            || get("OTEL_METRICS_EXPORTER").is_some_and(|list| !list.split(',').any(|one| one.trim() == "otlp"));
        let Some((name, endpoint)) = either(METRICS_ENDPOINT, ENDPOINT).filter(|_| !off) else { return Ok(None) };
        let (tls, host, port, path) =
            url(endpoint).ok_or(Fault { name, problem: "no URL of the form http://host:port/path or https://.." })?;
        let path = if name == METRICS_ENDPOINT { path } else { of_metrics(&path) };
        let protocol = match either("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL") {
            None | Some((_, "http/protobuf")) => Protocol::Protobuf,
            Some((_, "http/json")) => Protocol::Json,
            Some((name, _)) => return Err(Fault { name, problem: "neither http/protobuf nor http/json" }),
        };
        let millis = |entry: Option<(&'static str, &str)>, or: Duration| match entry {
            None => Ok(or),
            Some((name, value)) => match value.parse() {
                Ok(ms) => Ok(Duration::from_millis(ms).clamp(PERIODS.0, PERIODS.1)),
                Err(_) => Err(Fault { name, problem: "no number of milliseconds" }),
            },
        };
        let period = get("OTEL_METRIC_EXPORT_INTERVAL").map(|value| ("OTEL_METRIC_EXPORT_INTERVAL", value));
        let timeout = either("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT");
        let headers = match either("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS") {
            None => Vec::new(),
            Some((name, list)) => {
                headers(list).ok_or(Fault { name, problem: "not of the form name=value,name=value" })?
            }
        };
        let listed = get("OTEL_RESOURCE_ATTRIBUTES").map_or(Some(Vec::new()), pairs);
        let mut attributes = listed
            .ok_or(Fault { name: "OTEL_RESOURCE_ATTRIBUTES", problem: "not of the form name=value,name=value" })?;
        if let Some(service) = get("OTEL_SERVICE_NAME") {
            attributes.retain(|(name, _)| name != "service.name");
            attributes.push(("service.name".to_owned(), service.to_owned()));
        }
        let authorities = either("OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE");
        Ok(Some(Self {
            tls,
            host,
            port,
            path: Secret::new(path),
            headers,
            protocol,
            period: millis(period, PERIOD)?,
            timeout: millis(timeout, TIMEOUT)?,
            authorities: authorities.map(|(_, file)| file.to_owned()),
            attributes,
        }))
    }

    /// Where it goes, without what may be secret.
    #[must_use]
    pub fn shown(&self) -> String {
        format!("{}://{}:{}", if self.tls { "https" } else { "http" }, self.host, self.port)
    }

    /// Who it is that tells: what the environment says of the service, and which of its poolers, by its name and port.
    ///
    /// An instance that the environment names is the application's: the port tells its poolers from it, and from each other.
    pub(super) fn resource(&self, instance: &str) -> Vec<(String, String)> {
        let mut all = self.attributes.clone();
        if !all.iter().any(|(known, _)| known == "service.name") {
            all.push(("service.name".to_owned(), "pgweir".to_owned()));
        }
        match (all.iter_mut().find(|(known, _)| known == "service.instance.id"), instance.rsplit_once(':')) {
            (Some((_, given)), Some((_, port))) => {
                given.push(':');
                given.push_str(port);
            }
            (Some(_), None) => {}
            (None, _) => all.push(("service.instance.id".to_owned(), instance.to_owned())),
        }
        all
    }

    /// The head of the request for a body of so many bytes.
    pub(super) fn head(&self, length: usize) -> String {
        let kind = match self.protocol {
            Protocol::Json => "application/json",
            Protocol::Protobuf => "application/x-protobuf",
        };
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let mut head = format!(
            "POST {} HTTP/1.1\r\nHost: {host}:{}\r\nUser-Agent: pgweir/{}\r\nContent-Type: {kind}\r\n\
             Content-Length: {length}\r\nConnection: close\r\n",
            self.path.expose(),
            self.port,
            env!("CARGO_PKG_VERSION"),
        );
        for (name, value) in &self.headers {
            head.push_str(name);
            head.push_str(": ");
            head.push_str(value.expose());
            head.push_str("\r\n");
        }
        head.push_str("\r\n");
        head
    }
}

/// Whether it is `https`, the host, the port, and the path with its query.
fn url(text: &str) -> Option<(bool, String, u16, String)> {
    let (scheme, rest) = text.split_once("://")?;
    let tls = match scheme.to_ascii_lowercase().as_str() {
        "http" => false,
        "https" => true,
        _ => return None,
    };
    let (authority, path) = rest.find(['/', '?']).map_or((rest, ""), |at| rest.split_at(at));
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    // Users are not known here, and nothing may end a line of the request.
    if authority.contains('@') || text.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
        return None;
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (host, port.strip_prefix(':').or(port.is_empty().then_some(""))?)
        }
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    let default = if tls { 443 } else { 80 };
    let port = if port.is_empty() { default } else { port.parse().ok()? };
    (!host.is_empty()).then(|| (tls, host.to_owned(), port, path))
}

/// The path for metrics below the one for all signals.
fn of_metrics(path: &str) -> String {
    let (base, query) = path.find('?').map_or((path, ""), |at| path.split_at(at));
    format!("{}/v1/metrics{query}", base.trim_end_matches('/'))
}

/// `name=value,name=value`, percent-decoded.
fn pairs(list: &str) -> Option<Vec<(String, String)>> {
    let words = list.split(',').map(str::trim).filter(|word| !word.is_empty());
    words
        .map(|word| {
            let (name, value) = word.split_once('=')?;
            let (name, value) = (decode(name.trim())?, decode(value.trim())?);
            (!name.is_empty()).then_some((name, value))
        })
        .collect()
}

/// The same as headers: of characters that cannot end one.
fn headers(list: &str) -> Option<Vec<(String, Secret)>> {
    let token = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    let visible = |value: &str| value.bytes().all(|byte| (b' '..0x7f).contains(&byte));
    let all = pairs(list)?;
    let sound = all.iter().all(|(name, value)| token(name) && visible(value));
    sound.then(|| all.into_iter().map(|(name, value)| (name, Secret::new(value))).collect())
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        rest = behind;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = rest.get(2..)?;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<Target>, Fault> {
        let owned: Vec<_> = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Target::of(&owned)
    }

    #[test]
    fn the_environment_says_where_metrics_go() {
        #[rustfmt::skip]
        let table: [(&str, &str, &str, Option<(&str, &str)>); 8] = [
            ("plain",             ENDPOINT,         "http://otel:4318",         Some(("http://otel:4318", "/v1/metrics"))),
            ("with a path",       ENDPOINT,         "https://otel/a/?x=1",      Some(("https://otel:443", "/a/v1/metrics?x=1"))),
            ("a slash",           ENDPOINT,         "http://otel/",             Some(("http://otel:80", "/v1/metrics"))),
            ("for metrics alone", METRICS_ENDPOINT, "http://otel:1/x",          Some(("http://otel:1", "/x"))),
            ("of IPv6",           METRICS_ENDPOINT, "http://[::1]:4318",        Some(("http://::1:4318", "/"))),
            ("empty",             ENDPOINT,         "",                         None),
            ("switched off",      "OTEL_METRICS_EXPORTER", "none",              None),
            ("something else",    "OTEL_SERVICE_NAME", "app",                   None),
        ];
        for (name, variable, value, want) in table {
            let target = of(&[(variable, value)]).unwrap();
            let got = target.as_ref().map(|target| (target.shown(), target.path.expose().to_owned()));
            assert_eq!(got.as_ref().map(|(shown, path)| (shown.as_str(), path.as_str())), want, "{name}");
        }
        let off = of(&[(ENDPOINT, "http://otel"), ("OTEL_SDK_DISABLED", "true")]).unwrap();
        assert!(off.is_none());
    }

    #[test]
    fn headers_and_attributes_are_decoded_and_stay_secret() {
        let target = of(&[
            (ENDPOINT, "https://otel"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=a%2Cbearer%20of-a-token, other = 2"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=listed,deployment.environment.name=a%3Db"),
            ("OTEL_SERVICE_NAME", "named"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "5"),
        ]);
        let target = target.unwrap().unwrap();
        let head = target.head(3);
        assert!(head.starts_with("POST /v1/metrics HTTP/1.1\r\nHost: otel:443\r\n"), "{head}");
        assert!(head.contains("\r\nx-key: a,bearer of-a-token\r\nother: 2\r\n\r\n"), "{head}");
        assert!(head.contains("\r\nContent-Type: application/json\r\nContent-Length: 3\r\n"), "{head}");
        let resource = target.resource("web.1:6432");
        let want =
            [("deployment.environment.name", "a=b"), ("service.name", "named"), ("service.instance.id", "web.1:6432")];
        assert_eq!(resource, want.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let given = of(&[(ENDPOINT, "http://otel"), ("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=pod")]);
        let resource = given.unwrap().unwrap().resource("web.1:6432");
        let want = [("service.instance.id", "pod:6432"), ("service.name", "pgweir")];
        assert_eq!(resource, want.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert_eq!(target.period, PERIODS.0, "no shorter one is taken");
        assert!(!format!("{target:?}{}", target.shown()).contains("of-a-token"));
    }

    #[test]
    fn what_cannot_be_understood_is_named() {
        let good = (ENDPOINT, "http://otel");
        #[rustfmt::skip]
        let table = [
            ("another scheme", (ENDPOINT, "grpc://otel")),
            ("no host",        (ENDPOINT, "http://:4318")),
            ("a user",         (ENDPOINT, "http://user:of-a-token@otel")),
            ("two lines",      (ENDPOINT, "http://otel/\r\nx")),
            ("a wrong port",   (ENDPOINT, "http://otel:99999")),
            ("gRPC",           ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")),
            ("no number",      ("OTEL_METRIC_EXPORT_INTERVAL", "1m")),
            ("no pair",        ("OTEL_RESOURCE_ATTRIBUTES", "a")),
            ("no header",      ("OTEL_EXPORTER_OTLP_HEADERS", "a=%0d%0aof-a-token")),
            ("no percent",     ("OTEL_EXPORTER_OTLP_HEADERS", "a=%zz")),
        ];
        for (name, bad) in table {
            let fault = of(&[bad, good]).unwrap_err();
            assert_eq!(fault.name, bad.0, "{name}");
            assert!(!fault.to_string().contains("of-a-token"), "{fault}");
        }
    }
}
