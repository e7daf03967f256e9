//! The program's metrics: fetched over HTTP and read as OpenMetrics text.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// One line of the exposition.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Name with its suffix (`_total`, `_bucket`).
    pub name: String,
    /// Labels by name.
    pub labels: BTreeMap<String, String>,
    /// Value.
    pub value: f64,
}

/// One scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Vec<Sample>);

impl Metrics {
    /// Scrapes `/metrics` at `address`.
    ///
    /// # Errors
    /// What was wrong with the connection, the response or a line of it.
    pub fn fetch(address: SocketAddr) -> Result<Self, String> {
        let (head, body) = get_accepting(address, "/metrics", "Accept: application/openmetrics-text\r\n")?;
        let body = String::from_utf8(body).map_err(|e| e.to_string())?;
        let status = head.lines().next().unwrap_or_default();
        if !status.contains(" 200 ") {
            return Err(format!("{status:?} from {address}"));
        }
        let expected = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8";
        if !head.lines().any(|line| line.eq_ignore_ascii_case(expected)) {
            return Err(format!("not served as OpenMetrics: {head}"));
        }
        Self::parse(&body)
    }

    /// Reads an exposition; its last octets must be `# EOF` and a newline.
    ///
    /// # Errors
    /// The line that is none.
    pub fn parse(text: &str) -> Result<Self, String> {
        let lines = text.strip_suffix("# EOF\n").ok_or("does not end with # EOF")?.lines();
        lines
            .filter(|line| !line.starts_with('#'))
            .map(|line| parse_sample(line).ok_or_else(|| format!("not a sample: {line:?}")))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// All samples of `counterfoil_` + `name` that carry these labels.
    pub fn samples(&self, name: &str, labels: &[(&str, &str)]) -> impl Iterator<Item = &Sample> {
        let name = format!("counterfoil_{name}");
        self.0.iter().filter(move |sample| {
            sample.name == name && labels.iter().all(|(k, v)| sample.labels.get(*k).is_some_and(|have| have == v))
        })
    }

    /// Their sum; 0 if there are none (a series appears with its first event).
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        // The sum of nothing is -0 by itself.
        self.samples(name, labels).map(|sample| sample.value).fold(0.0, |sum, value| sum + value)
    }

    /// The one sample of this name and these labels.
    ///
    /// # Panics
    /// If there is none, or more than one.
    #[track_caller]
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let found: Vec<_> = self.samples(name, labels).collect();
        assert_eq!(found.len(), 1, "one sample {name} {labels:?}, not {found:?}");
        found[0].value
    }

    /// Does any sample have this name?
    pub fn has(&self, name: &str) -> bool {
        self.samples(name, &[]).next().is_some()
    }
}

/// `name{label="value",...} value [timestamp] [# exemplar]`
fn parse_sample(line: &str) -> Option<Sample> {
    let name_end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(name_end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, tail) = rest.split_once("=\"")?;
            let (value, tail) = parse_quoted(tail)?;
            labels.insert(label.to_owned(), value);
            rest = tail.strip_prefix(',').unwrap_or(tail);
        }
        rest = &rest[1..];
    }
    let value = rest.strip_prefix(' ')?.split(' ').next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// The text up to the closing quote, unescaped, and what follows it.
fn parse_quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            other => value.push(other),
        }
    }
    None
}

/// A GET: the head of the response, and its body. It speaks HTTP/1.0, so that no server answers in chunks.
///
/// # Errors
/// Of the connection, or a body of another length than announced.
pub fn get(address: SocketAddr, path: &str) -> Result<(String, String), String> {
    let (head, body) = get_accepting(address, path, "")?;
    Ok((head, String::from_utf8(body).map_err(|e| format!("GET {path} at {address}: {e}"))?))
}

/// The same with more header fields (each with its line's end), for a body of any kind.
///
/// # Errors
/// As for [`get`].
pub fn get_accepting(address: SocketAddr, path: &str, fields: &str) -> Result<(String, Vec<u8>), String> {
    let fail = |e: std::io::Error| format!("GET {path} at {address}: {e}");
    let mut stream = TcpStream::connect(address).map_err(fail)?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(fail)?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n{fields}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(fail)?;
    let mut response = Vec::new();
    stream.read_to_end(&mut response).map_err(fail)?;
    let end = response.windows(4).position(|octets| octets == b"\r\n\r\n").ok_or("a response without an empty line")?;
    let body = response.split_off(end + 4);
    response.truncate(end);
    let head = String::from_utf8(response).map_err(|e| e.to_string())?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    if length.is_some_and(|length| length != body.len()) {
        return Err(format!("{} octets of body, announced: {length:?}", body.len()));
    }
    Ok((head, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_labels_escapes_and_numbers() {
        let text = "# TYPE counterfoil_x gauge\ncounterfoil_x{a=\"1\",b=\"q\\\"uo\\nte\"} 2.5\ncounterfoil_x{a=\"2\"} 1\n\
                    counterfoil_y_bucket{le=\"+Inf\"} 3\ncounterfoil_z 1e-3\n# EOF\n";
        let metrics = Metrics::parse(text).unwrap();
        assert_eq!(metrics.sum("x", &[]), 3.5);
        assert_eq!(metrics.value("x", &[("b", "q\"uo\nte")]), 2.5);
        assert_eq!(metrics.value("z", &[]), 0.001);
        assert!(metrics.has("y_bucket") && !metrics.has("y"));
    }

    #[test]
    fn refuses_what_prometheus_refuses() {
        assert!(Metrics::parse("counterfoil_x 1\n").is_err());
        assert!(Metrics::parse("counterfoil_x 1\n# EOF\n\n").is_err());
        assert!(Metrics::parse("counterfoil_x\n# EOF\n").is_err());
    }
}
