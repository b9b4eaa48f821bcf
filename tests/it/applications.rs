//! Small real applications on drivers and frameworks with their default settings, nothing switched off: two of each at a
//! time, with settings of their own, on two server connections.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

mod sqlx;

use crate::drivers::{python, scripts};
use crate::stage::Stage;

/// What an application is given besides its own name, which comes last.
type Arguments = fn(&Stage<'_>) -> Vec<String>;

/// Host, port and user.
fn parts(stage: &Stage<'_>) -> Vec<String> {
    vec!["127.0.0.1".to_owned(), stage.pgweir.port().to_string(), stage.name().to_owned()]
}

/// A `conninfo`.
fn conninfo(stage: &Stage<'_>) -> Vec<String> {
    vec![format!("host=127.0.0.1 port={} user={1} dbname={1}", stage.pgweir.port(), stage.name())]
}

/// A driver of `SQLAlchemy`'s, address and user.
fn sqlalchemy(driver: &str, stage: &Stage<'_>) -> Vec<String> {
    vec![driver.to_owned(), format!("127.0.0.1:{}", stage.pgweir.port()), stage.name().to_owned()]
}

/// A file of `drivers` that is run by an interpreter.
fn script(interpreter: &Path, file: &str) -> Command {
    let mut command = Command::new(interpreter);
    command.arg(scripts().join(file)).env("NODE_PATH", cache().join("node/node_modules"));
    command
}

fn python_script(file: &str) -> Command {
    script(&python(), file)
}

fn node_script(file: &str) -> Command {
    script(Path::new("node"), file)
}

/// A stage with two server connections, and the roles that applications take.
fn stage_of_two() -> Stage<'static> {
    let stage = Stage::new(&[("default_pool_size", "2")]);
    let name = stage.name();
    stage.sql(&format!(
        "CREATE ROLE {name}_one; CREATE ROLE {name}_two; GRANT {name}_one, {name}_two TO {name}; \
         GRANT CREATE ON SCHEMA public TO {name}, {name}_one, {name}_two"
    ));
    stage
}

/// Runs an application twice at the same time; both must say `ok`, and never need a third server connection.
fn run_two(program: impl Fn() -> Command, arguments: Arguments) {
    let stage = stage_of_two();
    let watch = stage.place.cap_watch(2);
    let start = |me: &str| {
        let mut command = program();
        command.args(arguments(&stage)).arg(me).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let both = ["one", "two"].map(|me| (me, start(me)));
    for (me, child) in both {
        let output = child.wait_with_output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && out == "ok\n", "{:?}, {me}: {}\n{out}\n{err}", program(), output.status);
    }
    assert!(watch.finish() > 0);
}

/// Where `make deps` puts what it gets.
fn cache() -> PathBuf {
    python().ancestors().nth(3).unwrap().to_path_buf()
}

#[test]
fn psycopg_3_prepares_holds_cursors_and_listens() {
    run_two(|| python_script("app_psycopg3.py"), conninfo);
}

#[test]
fn psycopg2_sets_holds_cursors_and_listens() {
    run_two(|| python_script("app_psycopg2.py"), conninfo);
}

#[test]
fn asyncpg_caches_statements_and_resets_its_connections() {
    run_two(|| python_script("app_asyncpg.py"), parts);
}

#[test]
fn sqlalchemy_works_on_psycopg2() {
    run_two(|| python_script("app_sqlalchemy.py"), |stage| sqlalchemy("psycopg2", stage));
}

#[test]
fn sqlalchemy_works_on_psycopg_3() {
    run_two(|| python_script("app_sqlalchemy.py"), |stage| sqlalchemy("psycopg", stage));
}

#[test]
fn sqlalchemy_works_on_asyncpg() {
    run_two(|| python_script("app_sqlalchemy.py"), |stage| sqlalchemy("asyncpg", stage));
}

#[test]
fn django_reads_by_cursors_of_the_server_in_an_assumed_role() {
    run_two(|| python_script("app_django.py"), parts);
}

#[test]
fn node_postgres_logs_in_with_settings_and_names_statements() {
    run_two(|| node_script("app_node.js"), parts);
}

#[test]
fn prisma_creates_includes_and_rolls_back() {
    run_two(|| node_script("app_prisma.js"), parts);
}

#[test]
fn jdbc_names_statements_fetches_by_portions_and_listens() {
    let program = || {
        let mut command = Command::new("java");
        let classes = format!("{}:/usr/share/java/postgresql.jar", cache().join("jdbc").display());
        command.args(["-XX:TieredStopAtLevel=1", "-cp", &classes, "AppJdbc"]);
        command
    };
    run_two(program, parts);
}

#[test]
fn activerecord_migrates_prepares_and_recovers_from_an_altered_table() {
    run_two(|| script(Path::new("ruby"), "app_activerecord.rb"), parts);
}
