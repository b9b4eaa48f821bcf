//! The process handle, tested with a stand-in that logs what pgweir logs.
#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::Duration;

use pgweir_config::{AuthType, Config, Sources};
use pgweir_harness::{Cluster, ClusterOptions, HarnessError, Pgweir, PgweirOptions, pgweir_toml, secrets};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(20);

#[test]
fn the_configuration_text_is_one_that_pgweir_accepts() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let text = pgweir_toml(
        &cluster,
        &[
            ("default_pool_size", "3"),
            ("query_wait_timeout", "250ms"),
            ("auth_type", "trust"),
            ("databases.app.pool_size", "2"),
        ],
    );
    let config = Config::from_sources(Sources { file: Some(("pgweir.toml", &text)), env: &[], args: &[] })
        .unwrap_or_else(|faults| panic!("{faults}\n{text}"));
    assert_eq!(config.listen.listen_port, 0);
    assert_eq!(config.http.http_listen, "127.0.0.1:0");
    assert_eq!(config.pool.default_pool_size, 3);
    assert_eq!(config.pool.query_wait_timeout, Duration::from_millis(250));
    assert_eq!(config.auth.auth_type, AuthType::Trust, "what is given wins");
    let database = &config.databases["app"];
    assert_eq!(database.port, cluster.port());
    assert_eq!(database.pool_size, Some(2));
    assert_eq!(config.users["app"].password.as_ref().unwrap().expose(), "app-secret");
}

/// A program in Python with this body after its first log lines; Python since it can serve HTTP.
fn program(body: &str) -> (TempDir, PathBuf) {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("pgweir");
    let text = format!(
        "#!/usr/bin/env python3\n\
         import http.server, os, signal, sys, time\n\
         def log(line): print(line, file=sys.stderr, flush=True)\n\
         {body}\n"
    );
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o755)).unwrap();
    (directory, path)
}

fn start(bin: PathBuf) -> Result<Pgweir, HarnessError> {
    Pgweir::start_with(PgweirOptions {
        toml: "[listen]\nlisten_port = 0\n".to_owned(),
        args: vec!["--log-level=debug".to_owned()],
        env: vec![("PGWEIR_TEST".to_owned(), "kept".to_owned())],
        bin: Some(bin),
    })
}

#[test]
fn a_ready_process_is_known_asked_signalled_and_awaited() {
    let (_directory, bin) = program(
        "\
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = ('page ' + self.path).encode()
        self.send_response(404 if self.path == '/none' else 200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
def stop(*_):
    log('msg=\"shutting down\"')
    os._exit(7)
signal.signal(signal.SIGTERM, stop)
server = http.server.HTTPServer(('127.0.0.1', 0), Page)
log('msg=\"started as\" args=\"%s\"' % ' '.join(sys.argv[1:]))
log('config=' + repr(open(sys.argv[3]).read()))
log('inherited=' + ','.join(k for k in os.environ if k.startswith('PG')))
log('level=info msg=listening role=postgres addr=127.0.0.1:7001')
log('addr=\"127.0.0.1:7002\" role=\"postgres\" msg=\"listening\"')
log('msg=listening role=http addr=127.0.0.1:%d' % server.server_port)
log('msg=ready')
server.serve_forever()",
    );
    let pgweir = start(bin).unwrap();
    assert_eq!(pgweir.port(), 7001);
    assert_eq!(pgweir.addrs().len(), 2);
    assert_eq!(pgweir.url("app", "x"), "postgres://app:app-secret@127.0.0.1:7001/x");
    let log = pgweir.log();
    let config = pgweir.config_path();
    let args = format!("args=\"serve --config {} --log-level=debug\"", config.display());
    assert!(log.contains(&args), "{log}");
    assert!(log.contains("listen_port = 0"), "{log}");
    assert!(log.contains("inherited=PGWEIR_TEST\n"), "{log}");
    assert_eq!(pgweir.http_get("/limits").unwrap(), (200, "page /limits".to_owned()));
    assert_eq!(pgweir.http_get("/none").unwrap().0, 404);
    assert!(pgweir.rss_anon_kib().unwrap() > 1000);
    let (user, system) = pgweir.cpu_time().unwrap();
    assert!(user + system > Duration::ZERO);

    let late = pgweir.wait_log("shutting", Duration::from_millis(20));
    assert!(matches!(late, Err(HarnessError::Late { .. })));
    pgweir.signal(libc::SIGTERM).unwrap();
    let line = pgweir.wait_log_from(log.len(), "shutting", SOON).unwrap();
    assert_eq!(line, "msg=\"shutting down\"");
    assert_eq!(pgweir.wait_exit(SOON).unwrap().code(), Some(7));
    assert!(!pgweir.is_running());
    pgweir.signal(libc::SIGTERM).unwrap();
}

#[test]
fn an_early_end_is_reported_with_its_log() {
    let (_directory, bin) = program("log('default_pool_size = 0: outside'); sys.exit(3)");
    match start(bin) {
        Err(HarnessError::Ended { status, log, .. }) => {
            assert_eq!(status.code(), Some(3));
            assert!(log.contains("default_pool_size"), "{log}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_dropped_process_is_gone() {
    let (_directory, bin) = program(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)
log('msg=listening role=postgres addr=127.0.0.1:7001')
log('msg=ready')
time.sleep(300)",
    );
    let pgweir = start(bin).unwrap();
    let (pid, config) = (pgweir.pid(), pgweir.config_path());
    assert!(pgweir.is_running() && config.exists());
    assert!(pgweir.wait_exit(Duration::from_millis(10)).is_err());
    pgweir.signal(libc::SIGKILL).unwrap();
    assert_eq!(pgweir.wait_exit(SOON).unwrap().signal(), Some(9));
    drop(pgweir);
    assert!(!config.exists());
    assert!(fs::metadata(format!("/proc/{pid}")).is_err());
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let error = start(PathBuf::from("/nowhere/pgweir")).unwrap_err();
    assert!(error.to_string().contains("/nowhere/pgweir"), "{error}");
}

/// What the end of this one says to the test: nothing, or the panic that fails it.
fn end_of(pgweir: Pgweir) -> Option<String> {
    let end = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(pgweir)));
    end.err().map(|panic| panic.downcast_ref::<String>().unwrap().clone())
}

/// Tells `METRICS` of itself, and logs `LOGGED`.
const SERVE: &str = "\
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'METRICS\\n'
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
server = http.server.HTTPServer(('127.0.0.1', 0), Page)
log('msg=listening role=postgres addr=127.0.0.1:7001')
log('msg=listening role=http addr=127.0.0.1:%d' % server.server_port)
log('msg=ready')
log('LOGGED')
server.serve_forever()";

/// One that serves these metrics, and has logged this line.
fn serving(logged: &str, metrics: &str) -> (TempDir, Pgweir) {
    let (directory, bin) = program(&SERVE.replace("LOGGED", logged).replace("METRICS", metrics));
    let pgweir = start(bin).unwrap();
    pgweir.wait_log(logged, SOON).unwrap();
    (directory, pgweir)
}

#[test]
fn a_secret_in_the_log_or_the_metrics_fails_the_test_when_pgweir_stops() {
    secrets::keep("planted-secret");
    #[rustfmt::skip]
    let table = [
        ("nowhere",        "a log line",              "a user",         None),
        ("in the log",     "user=\"planted-secret\"", "a user",         Some("pgweir's log: user=\"planted-secret\"")),
        ("in the metrics", "a log line",              "planted-secret", Some("/metrics: pgweir_clients{user=\"planted-secret\"} 1")),
    ];
    for (name, logged, planted, want) in table {
        let (_directory, pgweir) = serving(logged, &format!("pgweir_clients{{user=\"{planted}\"}} 1"));
        let told = end_of(pgweir);
        assert_eq!(told.as_deref().map(|told| told.split_once(" is in ").unwrap().1), want, "{name}: {told:?}");
    }
}

#[test]
fn an_audit_that_found_something_fails_the_test_when_pgweir_stops() {
    const NONE: &str = "pgweir_audit_failures_total{pool=\"app\"} 0";
    const ONE: &str = "pgweir_audit_failures_total{pool=\"app\"} 1";
    const LINE: &str = "level=error msg=\"an audit found what was not known\" client=7";
    #[rustfmt::skip]
    let table = [
        ("nowhere",                false, "a log line", NONE, None),
        ("in the log",             false, LINE,         NONE, Some(format!("pgweir's log: {LINE}"))),
        ("in the metrics",         false, "a log line", ONE,  Some(format!("/metrics: {ONE}"))),
        ("the test knows of it",   true,  LINE,         ONE,  None),
    ];
    for (name, may_find, logged, metrics, want) in table {
        let (_directory, pgweir) = serving(logged, metrics);
        if may_find {
            pgweir.audits_may_find();
        }
        let told = end_of(pgweir);
        let told = told.as_deref().map(|told| told.split_once(", says ").unwrap().1);
        assert_eq!(told, want.as_deref(), "{name}");
    }
}

#[test]
fn a_secret_of_a_file_that_changed_meanwhile_is_known_too() {
    let (directory, bin) = program(
        "log('msg=listening role=postgres addr=127.0.0.1:7001'); log('msg=ready')
sys.stdin.read()
while 'token' not in open(sys.argv[3]).read(): time.sleep(0.01)
log('the token is ' + open(os.path.dirname(__file__) + '/token').read()); time.sleep(300)",
    );
    let pgweir = start(bin).unwrap();
    let token = directory.path().join("token");
    fs::write(&token, "changed-since\n").unwrap();
    fs::write(pgweir.config_path(), format!("[databases.app]\npassword_file = {token:?}\n")).unwrap();
    pgweir.wait_log("the token is", SOON).unwrap();
    let told = end_of(pgweir).unwrap();
    assert!(told.contains("the token is changed-since"), "{told}");
}
