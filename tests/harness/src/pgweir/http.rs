//! A tiny HTTP/1.1 GET.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::error::{Doing, HarnessError};

/// Gets `path`; returns the status code and the body, with bytes that are not UTF-8 replaced. Waits for each step so long.
pub(super) fn get(address: SocketAddr, path: &str, patience: Duration) -> Result<(u16, String), HarnessError> {
    get_with(address, path, &[&format!("Host: {address}")], patience)
}

/// [`get`] with these header lines, and no `Host` but theirs.
pub(super) fn get_with(
    address: SocketAddr,
    path: &str,
    lines: &[&str],
    patience: Duration,
) -> Result<(u16, String), HarnessError> {
    let answer = exchange(address, path, lines, patience).doing("getting", format!("http://{address}{path}"))?;
    parse(&answer)
        .ok_or_else(|| HarnessError::NotHttp { start: answer.escape_ascii().take(200).map(char::from).collect() })
}

fn exchange(address: SocketAddr, path: &str, lines: &[&str], patience: Duration) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let lines = lines.join("\r\n");
    let request = format!("GET {path} HTTP/1.1\r\n{lines}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Splits an answer that ended with the connection. Source: RFC 9112 §4, §6.
fn parse(answer: &[u8]) -> Option<(u16, String)> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let (head, body) = answer.split_at_checked(end)?;
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    let mut lines = head.lines();
    let (_version, status) = lines.next()?.strip_prefix("http/1.")?.split_once(' ')?;
    let status = status.get(..3)?;
    let chunked = lines
        .filter_map(|line| line.split_once(':'))
        .any(|(name, value)| name == "transfer-encoding" && value.trim() == "chunked");
    let body = body.get(4..)?;
    let body = if chunked { dechunk(body)? } else { body.to_vec() };
    let text = String::from_utf8_lossy(&body).into_owned();
    Some((status.parse().ok()?, text))
}

/// Source: RFC 9112 §7.1.
fn dechunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|two| two == b"\r\n")?;
        let size = String::from_utf8_lossy(rest.get(..end)?).into_owned();
        let size = size.split(';').next()?.trim();
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        let data = rest.get(end + 2..)?;
        body.extend(data.get(..size)?);
        rest = data.get(size..)?.strip_prefix(b"\r\n")?;
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn answers_are_split_with_and_without_chunks() {
        type Want = Option<(u16, &'static str)>;
        #[rustfmt::skip]
        let table: [(&str, &str, Want); 4] = [
            ("plain",     "HTTP/1.1 200 OK\r\nA: b\r\n\r\nhello",   Some((200, "hello"))),
            ("no body",   "HTTP/1.1 503 Busy\r\n\r\n",              Some((503, ""))),
            ("chunked",   "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nhel\r\nA\r\nlo world!!\r\n0\r\n\r\n", Some((200, "hello world!!"))),
            ("not http",  "FATAL\r\n\r\n",                          None),
        ];
        for (name, answer, want) in table {
            let want = want.map(|(status, body)| (status, body.to_owned()));
            assert_eq!(parse(answer.as_bytes()), want, "{name}");
        }
    }
}
