//! A message of OTLP, made of the text that `/metrics` has, in either of its spellings.
//!
//! One tree stands for both: each field has its number, for protobuf, and its name, for JSON.
//!
//! A metric's name is the one of `/metrics` as OpenTelemetry wants it, which Prometheus turns back into the same: without
//! the unit and `_total`, with a dot behind `pgweir`.
//!
//! Source: opentelemetry-proto 1.x, `metrics/v1/metrics.proto`, `common/v1/common.proto`, `resource/v1/resource.proto`; the
//! specification's "OTLP/HTTP", "JSON Protobuf Encoding"; "Prometheus and `OpenMetrics` Compatibility".

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// A cumulative sum.
const CUMULATIVE: u8 = 2;

/// A value of a message.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(String),
    /// `fixed64`.
    Whole(u64),
    /// `double`.
    Number(f64),
    Flag(bool),
    /// Of an enum.
    Choice(u8),
    Message(Vec<Field>),
    /// A repeated message.
    Messages(Vec<Vec<Field>>),
    /// A repeated `fixed64`.
    Wholes(Vec<u64>),
    /// A repeated `double`.
    Numbers(Vec<f64>),
}

/// A field of a message: number, name, value.
pub(super) type Field = (u32, &'static str, Value);

/// The request that tells what `text`, of the text format 0.0.4 as we write it, says.
pub(super) fn request(text: &str, resource: &[(String, String)], began: SystemTime, now: SystemTime) -> Vec<Field> {
    let times = Times { began: nanos(began), now: nanos(now) };
    let metrics = families(text).into_iter().map(|family| family.metric(times)).collect();
    let attributes = resource.iter().map(|(name, value)| attribute(name, value)).collect();
    let scope =
        vec![(1, "name", Value::Text("pgweir".into())), (2, "version", Value::Text(env!("CARGO_PKG_VERSION").into()))];
    let scoped = vec![(1, "scope", Value::Message(scope)), (2, "metrics", Value::Messages(metrics))];
    let of_resource = vec![
        (1, "resource", Value::Message(vec![(1, "attributes", Value::Messages(attributes))])),
        (2, "scopeMetrics", Value::Messages(vec![scoped])),
    ];
    vec![(1, "resourceMetrics", Value::Messages(vec![of_resource]))]
}

/// Nanoseconds since 1970.
#[derive(Clone, Copy)]
struct Times {
    began: u64,
    now: u64,
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    u64::try_from(since).unwrap_or(u64::MAX)
}

fn attribute(name: &str, value: &str) -> Vec<Field> {
    let value = vec![(1, "stringValue", Value::Text(value.to_owned()))];
    vec![(1, "key", Value::Text(name.to_owned())), (2, "value", Value::Message(value))]
}

/// One metric of the text, with all of its series.
#[derive(Debug, Default)]
struct Family {
    name: String,
    help: String,
    kind: String,
    /// What stands behind the name (`_bucket`), the labels, the value.
    samples: Vec<(String, Vec<(String, String)>, f64)>,
}

/// Reads the text. What cannot be read, which is a defect, is left out.
fn families(text: &str) -> Vec<Family> {
    let mut all: Vec<Family> = Vec::new();
    for line in text.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            all.push(Family { name: name.to_owned(), help: help.to_owned(), ..Family::default() });
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            if all.last().is_none_or(|family| family.name != name) {
                all.push(Family { name: name.to_owned(), ..Family::default() });
            }
            if let Some(family) = all.last_mut() {
                kind.clone_into(&mut family.kind);
            }
        } else if let Some(family) = all.last_mut() {
            family.samples.extend(sample(&family.name, line));
        }
    }
    all.retain(|family| !family.samples.is_empty());
    all
}

/// `NAME{LABEL="VALUE",..} NUMBER`.
fn sample(family: &str, line: &str) -> Option<(String, Vec<(String, String)>, f64)> {
    let (series, value) = line.rsplit_once(' ')?;
    let rest = series.strip_prefix(family)?;
    let (suffix, labels) = rest.split_once('{').unwrap_or((rest, "}"));
    Some((suffix.to_owned(), labels_of(labels.strip_suffix('}')?)?, value.parse().ok()?))
}

fn labels_of(text: &str) -> Option<Vec<(String, String)>> {
    let (mut rest, mut labels) = (text, Vec::new());
    while !rest.is_empty() {
        let (name, quoted) = rest.split_once("=\"")?;
        let (mut value, mut chars) = (String::new(), quoted.chars());
        loop {
            match chars.next()? {
                '"' => break,
                '\\' => match chars.next()? {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                other => value.push(other),
            }
        }
        labels.push((name.to_owned(), value));
        let behind = chars.as_str();
        rest = behind.strip_prefix(',').unwrap_or(behind);
    }
    Some(labels)
}

impl Family {
    fn metric(&self, times: Times) -> Vec<Field> {
        let (name, unit) = named(&self.name);
        let mut metric = vec![
            (1, "name", Value::Text(name)),
            (2, "description", Value::Text(self.help.clone())),
            (3, "unit", Value::Text(unit.to_owned())),
        ];
        metric.push(match self.kind.as_str() {
            "counter" => {
                let sum = vec![
                    (1, "dataPoints", Value::Messages(self.points(times, true))),
                    (2, "aggregationTemporality", Value::Choice(CUMULATIVE)),
                    (3, "isMonotonic", Value::Flag(true)),
                ];
                (7, "sum", Value::Message(sum))
            }
            "histogram" => {
                let histogram = vec![
                    (1, "dataPoints", Value::Messages(self.distributions(times))),
                    (2, "aggregationTemporality", Value::Choice(CUMULATIVE)),
                ];
                (9, "histogram", Value::Message(histogram))
            }
            _ => (5, "gauge", Value::Message(vec![(1, "dataPoints", Value::Messages(self.points(times, false)))])),
        });
        metric
    }

    fn points(&self, times: Times, sums: bool) -> Vec<Vec<Field>> {
        let point = |labels: &[(String, String)], value: f64| {
            let mut point = vec![(7, "attributes", attributes(labels))];
            if sums {
                point.push((2, "startTimeUnixNano", Value::Whole(times.began)));
            }
            point.push((3, "timeUnixNano", Value::Whole(times.now)));
            point.push((4, "asDouble", Value::Number(value)));
            point
        };
        self.samples.iter().map(|(_, labels, value)| point(labels, *value)).collect()
    }

    /// Of each series its buckets, which the text has as running totals.
    fn distributions(&self, times: Times) -> Vec<Vec<Field>> {
        let mut all: Vec<Distribution> = Vec::new();
        for (suffix, labels, value) in &self.samples {
            let mut labels = labels.clone();
            let bound = labels.iter().position(|(name, _)| name == "le").map(|at| labels.remove(at).1);
            if all.last().is_none_or(|last| last.labels != labels) {
                all.push(Distribution { labels, ..Distribution::default() });
            }
            let Some(last) = all.last_mut() else { continue };
            match (suffix.as_str(), bound.as_deref()) {
                ("_bucket", Some(bound)) => {
                    let total = whole(*value);
                    last.counts.push(total.saturating_sub(last.total));
                    last.total = total;
                    // The last, +Inf, has no bound of its own.
                    last.bounds.extend(bound.parse().ok().filter(|bound: &f64| bound.is_finite()));
                }
                ("_sum", None) => last.sum = *value,
                _ => {}
            }
        }
        all.into_iter().map(|distribution| distribution.point(times)).collect()
    }
}

/// A series of a histogram.
#[derive(Default)]
struct Distribution {
    labels: Vec<(String, String)>,
    bounds: Vec<f64>,
    counts: Vec<u64>,
    total: u64,
    sum: f64,
}

impl Distribution {
    fn point(self, times: Times) -> Vec<Field> {
        vec![
            (9, "attributes", attributes(&self.labels)),
            (2, "startTimeUnixNano", Value::Whole(times.began)),
            (3, "timeUnixNano", Value::Whole(times.now)),
            (4, "count", Value::Whole(self.total)),
            (5, "sum", Value::Number(self.sum)),
            (6, "bucketCounts", Value::Wholes(self.counts)),
            (7, "explicitBounds", Value::Numbers(self.bounds)),
        ]
    }
}

fn attributes(labels: &[(String, String)]) -> Value {
    Value::Messages(labels.iter().map(|(name, value)| attribute(name, value)).collect())
}

/// A count that came as text.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counts, which the cast saturates")]
fn whole(value: f64) -> u64 {
    value as u64
}

/// The name in OpenTelemetry's manner, and the unit by UCUM.
fn named(name: &str) -> (String, &'static str) {
    let bare = name.strip_suffix("_total").unwrap_or(name);
    let (bare, unit) = match (bare.strip_suffix("_seconds"), bare.strip_suffix("_bytes")) {
        (Some(bare), _) => (bare, "s"),
        (None, Some(bare)) => (bare, "By"),
        (None, None) => (bare, ""),
    };
    (bare.replacen('_', ".", 1), unit)
}

// ---- spellings ----

/// As JSON: whole numbers are strings, and names are in camel case.
pub(super) fn json(fields: &[Field]) -> String {
    let mut text = String::new();
    write_json(fields, &mut text);
    text
}

fn write_json(fields: &[Field], text: &mut String) {
    text.push('{');
    for (nth, (_, name, value)) in fields.iter().enumerate() {
        if nth > 0 {
            text.push(',');
        }
        let _ = write!(text, "\"{name}\":");
        match value {
            Value::Text(value) => text.push_str(&serde_json::Value::from(value.as_str()).to_string()),
            Value::Whole(value) => write_whole(*value, text),
            Value::Number(value) => write_number(*value, text),
            Value::Flag(value) => text.push_str(if *value { "true" } else { "false" }),
            Value::Choice(value) => text.push_str(&value.to_string()),
            Value::Message(fields) => write_json(fields, text),
            Value::Messages(all) => list(text, all, |fields, text| write_json(fields, text)),
            Value::Wholes(all) => list(text, all, |value, text| write_whole(*value, text)),
            Value::Numbers(all) => list(text, all, |value, text| write_number(*value, text)),
        }
    }
    text.push('}');
}

fn write_whole(value: u64, text: &mut String) {
    let _ = write!(text, "\"{value}\"");
}

fn write_number(value: f64, text: &mut String) {
    text.push_str(&serde_json::Value::from(value).to_string());
}

fn list<T>(text: &mut String, all: &[T], mut write: impl FnMut(&T, &mut String)) {
    text.push('[');
    for (nth, one) in all.iter().enumerate() {
        if nth > 0 {
            text.push(',');
        }
        write(one, text);
    }
    text.push(']');
}

/// As protobuf.
///
/// Source: the Protocol Buffers manual, "Encoding".
pub(super) fn protobuf(fields: &[Field]) -> Vec<u8> {
    const VARINT: u32 = 0;
    const FIXED64: u32 = 1;
    const LENGTH: u32 = 2;
    let mut out = Vec::new();
    for (number, _, value) in fields {
        let tag = |kind: u32, out: &mut Vec<u8>| varint(u64::from((number << 3) | kind), out);
        let block = |bytes: &[u8], out: &mut Vec<u8>| {
            tag(LENGTH, out);
            varint(bytes.len() as u64, out);
            out.extend_from_slice(bytes);
        };
        match value {
            Value::Text(text) => block(text.as_bytes(), &mut out),
            Value::Whole(value) => {
                tag(FIXED64, &mut out);
                out.extend_from_slice(&value.to_le_bytes());
            }
            Value::Number(value) => {
                tag(FIXED64, &mut out);
                out.extend_from_slice(&value.to_le_bytes());
            }
            Value::Flag(value) => {
                tag(VARINT, &mut out);
                varint(u64::from(*value), &mut out);
            }
            Value::Choice(value) => {
                tag(VARINT, &mut out);
                varint(u64::from(*value), &mut out);
            }
            Value::Message(fields) => block(&protobuf(fields), &mut out),
            Value::Messages(all) => all.iter().for_each(|fields| block(&protobuf(fields), &mut out)),
            Value::Wholes(all) => {
                block(&all.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>(), &mut out);
            }
            Value::Numbers(all) => {
                block(&all.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>(), &mut out);
            }
        }
    }
    out
}

/// Seven bits a byte, the lowest first; the highest bit says that more follow.
fn varint(mut value: u64, out: &mut Vec<u8>) {
    loop {
        let [low, ..] = (value & 0x7f).to_le_bytes();
        value >>= 7;
        if value == 0 {
            return out.push(low);
        }
        out.push(low | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const TEXT: &str = "# HELP pgweir_from_clients_bytes_total Bytes.\n\
        # TYPE pgweir_from_clients_bytes_total counter\n\
        pgweir_from_clients_bytes_total{database=\"a\\\"b\\\\c\\n}\",user=\"u\"} 12\n\n\
        # HELP pgweir_clients Clients, by state.\n# TYPE pgweir_clients gauge\n\
        pgweir_clients{state=\"idle\"} 3\npgweir_clients{state=\"active\"} 0\n\n\
        # HELP pgweir_wait_seconds Waits.\n# TYPE pgweir_wait_seconds histogram\n\
        pgweir_wait_seconds_bucket{user=\"u\",le=\"0.000032\"} 1\npgweir_wait_seconds_bucket{user=\"u\",le=\"0.000064\"} 4\n\
        pgweir_wait_seconds_bucket{user=\"u\",le=\"+Inf\"} 5\npgweir_wait_seconds_sum{user=\"u\"} 1.5\n\
        pgweir_wait_seconds_count{user=\"u\"} 5\n";

    fn made() -> Vec<Field> {
        let time = |s: u64| UNIX_EPOCH + Duration::from_secs(s);
        request(TEXT, &[("service.name".into(), "app".into())], time(1), time(2))
    }

    #[test]
    fn the_text_becomes_a_message_as_the_specification_has_it() {
        let got: serde_json::Value = serde_json::from_str(&json(&made())).unwrap();
        let scope = &got["resourceMetrics"][0]["scopeMetrics"][0];
        let own = |key: &str, value: &str| serde_json::json!({ "key": key, "value": { "stringValue": value } });
        assert_eq!(
            got["resourceMetrics"][0]["resource"]["attributes"],
            serde_json::json!([own("service.name", "app")])
        );
        assert_eq!(scope["scope"]["name"], "pgweir");
        let want = serde_json::json!([
            { "name": "pgweir.from_clients", "description": "Bytes.", "unit": "By", "sum": {
                "dataPoints": [{ "attributes": [own("database", "a\"b\\c\n}"), own("user", "u")],
                    "startTimeUnixNano": "1000000000", "timeUnixNano": "2000000000", "asDouble": 12.0 }],
                "aggregationTemporality": 2, "isMonotonic": true } },
            { "name": "pgweir.clients", "description": "Clients, by state.", "unit": "", "gauge": { "dataPoints": [
                { "attributes": [own("state", "idle")], "timeUnixNano": "2000000000", "asDouble": 3.0 },
                { "attributes": [own("state", "active")], "timeUnixNano": "2000000000", "asDouble": 0.0 } ] } },
            { "name": "pgweir.wait", "description": "Waits.", "unit": "s", "histogram": {
                "dataPoints": [{ "attributes": [own("user", "u")], "startTimeUnixNano": "1000000000",
                    "timeUnixNano": "2000000000", "count": "5", "sum": 1.5, "bucketCounts": ["1", "3", "1"],
                    "explicitBounds": [0.000_032, 0.000_064] }],
                "aggregationTemporality": 2 } },
        ]);
        assert_eq!(scope["metrics"], want);
    }

    /// The fields of a message of protobuf: number, and what is there.
    fn read(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let mut fields = Vec::new();
        let take = |bytes: &mut &[u8]| {
            let (mut value, mut shift) = (0_u64, 0);
            loop {
                let (first, rest) = bytes.split_first().unwrap();
                *bytes = rest;
                value |= u64::from(first & 0x7f) << shift;
                shift += 7;
                if first & 0x80 == 0 {
                    return value;
                }
            }
        };
        while !bytes.is_empty() {
            let tag = take(&mut bytes);
            let value = match tag & 7 {
                0 => vec![u8::try_from(take(&mut bytes)).unwrap()],
                1 => bytes.split_off(..8).unwrap().to_vec(),
                2 => {
                    let len = usize::try_from(take(&mut bytes)).unwrap();
                    bytes.split_off(..len).unwrap().to_vec()
                }
                kind => panic!("kind {kind}"),
            };
            fields.push((tag >> 3, value));
        }
        fields
    }

    /// What stands at the end of a way of field numbers, each with which of its repetitions.
    fn at(message: &[u8], way: &[(u64, usize)]) -> Vec<u8> {
        way.iter().fold(message.to_vec(), |message, (number, nth)| {
            let mut found = read(&message).into_iter().filter(|(known, _)| known == number);
            found.nth(*nth).unwrap_or_else(|| panic!("no field {number} in {message:?}")).1
        })
    }

    #[test]
    fn protobuf_has_each_value_under_its_number() {
        let bytes = protobuf(&made());
        let scope = [(1, 0), (2, 0)];
        let of = |way: &[(u64, usize)]| at(&bytes, &[&scope[..], way].concat());
        #[rustfmt::skip]
        let texts: [(&[(u64, usize)], &str); 6] = [
            (&[(1, 0), (1, 0)],                                 "pgweir"),
            (&[(2, 0), (1, 0)],                                 "pgweir.from_clients"),
            (&[(2, 0), (3, 0)],                                 "By"),
            (&[(2, 0), (7, 0), (1, 0), (7, 1), (1, 0)],         "user"),
            (&[(2, 1), (5, 0), (1, 1), (7, 0), (2, 0), (1, 0)], "active"),
            (&[(2, 2), (9, 0), (1, 0), (9, 0), (2, 0), (1, 0)], "u"),
        ];
        for (way, want) in texts {
            assert_eq!(String::from_utf8(of(way)).unwrap(), want, "{way:?}");
        }
        #[rustfmt::skip]
        let rest: [(&[(u64, usize)], Vec<u8>); 8] = [
            (&[(2, 0), (7, 0), (2, 0)],         vec![2]),
            (&[(2, 0), (7, 0), (3, 0)],         vec![1]),
            (&[(2, 0), (7, 0), (1, 0), (3, 0)], 2_000_000_000_u64.to_le_bytes().into()),
            (&[(2, 0), (7, 0), (1, 0), (4, 0)], 12_f64.to_le_bytes().into()),
            (&[(2, 2), (9, 0), (1, 0), (4, 0)], 5_u64.to_le_bytes().into()),
            (&[(2, 2), (9, 0), (1, 0), (5, 0)], 1.5_f64.to_le_bytes().into()),
            (&[(2, 2), (9, 0), (1, 0), (6, 0)], [1_u64, 3, 1].map(u64::to_le_bytes).concat()),
            (&[(2, 2), (9, 0), (1, 0), (7, 0)], [0.000_032_f64, 0.000_064].map(f64::to_le_bytes).concat()),
        ];
        for (way, want) in rest {
            assert_eq!(of(way), want, "{way:?}");
        }
        assert_eq!(at(&bytes, &[(1, 0), (1, 0), (1, 0), (2, 0), (1, 0)]), b"app");
        let mut long = Vec::new();
        varint(300, &mut long);
        assert_eq!(long, [0xac, 2]);
    }

    #[test]
    fn a_name_becomes_what_prometheus_turns_back_into_it() {
        for metric in crate::metrics::ALL {
            let (name, unit) = named(metric.name);
            let mut back = name.replace('.', "_");
            back.push_str(match unit {
                "s" => "_seconds",
                "By" => "_bytes",
                _ => "",
            });
            if metric.kind == crate::metrics::Kind::Counter {
                back.push_str("_total");
            }
            assert_eq!(back, metric.name);
        }
    }
}
