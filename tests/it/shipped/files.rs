//! Files that others read: each can be read, and names nothing that is not there.

use std::collections::BTreeSet;
use std::fs;

use pgweir_config::{Config, Sources, settings};
use pgweir_harness::wait_until;
use serde_json::Value;

use super::{both, clean, files_of, shipped, text, well, yaml};
use crate::support::{SOON, Site, assert_value};
use crate::tls::pki::Folder;

const FOLDERS: [&str; 3] = ["buildpack", "platforms", "monitoring"];

#[test]
fn every_script_passes_shellcheck() {
    let scripts: Vec<String> = files_of(&FOLDERS).into_iter().filter(|name| text(name).starts_with("#!")).collect();
    assert!(scripts.len() >= 7, "{scripts:?}");
    for script in &scripts {
        let shell = if text(script).lines().next().unwrap().ends_with("bash") { "bash" } else { "sh" };
        well(clean(shell).arg("-n").arg(shipped(script)));
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(shipped(script)).unwrap().permissions());
        assert_eq!(mode & 0o111, 0o111, "{script} is not executable");
    }
    let check = clean("shellcheck").args(scripts.iter().map(|name| shipped(name))).output();
    let check = check.expect("shellcheck, from `make deps`");
    assert!(check.status.success(), "{}", both(&check));
}

/// The words of a text that look like variables or metrics.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|word| !word.is_empty())
}

#[test]
fn every_variable_that_a_file_names_is_one() {
    let known = |name: &str| {
        let key = name.strip_prefix("PGWEIR_").unwrap().to_ascii_lowercase();
        ["config", "databases", "users"].contains(&&*key)
            || settings::all().any(|setting| setting.name == key)
            || pgweir::sidecar::VARIABLES.contains(&name)
    };
    let mut seen = 0;
    for file in files_of(&FOLDERS).into_iter().chain(["README.md".to_owned()]) {
        for name in words(&text(&file)).filter(|word| word.starts_with("PGWEIR_")) {
            assert!(known(name), "{file}: {name}");
            seen += 1;
        }
    }
    assert!(seen > 10, "{seen}");
}

/// The settings among the variables of a container or service.
fn config_of(env: &[(String, String)]) -> Config {
    let env: Vec<_> = env.iter().filter(|(name, _)| name.starts_with("PGWEIR_")).cloned().collect();
    Config::from_sources(Sources { env: &env, ..Sources::default() }).unwrap_or_else(|faults| panic!("{faults}"))
}

#[test]
fn the_compose_file_starts_a_pgweir_that_its_application_reaches() {
    let compose = &yaml(&text("platforms/compose.yaml"))[0]["services"];
    let env = |service: &str| -> Vec<(String, String)> {
        let env = compose[service]["environment"].as_object().unwrap();
        env.iter().map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned())).collect()
    };
    let config = config_of(&env("pgweir"));
    let of = |service: &str, name: &str| env(service).into_iter().find(|(key, _)| key == name).unwrap().1;
    let database = &config.databases[&*of("app", "PGDATABASE")];
    assert_eq!((&*database.host, database.port), ("postgres", 5432));
    assert_eq!(database.user.as_deref(), Some(&*of("postgres", "POSTGRES_USER")));
    assert!(config.users.contains_key(&*of("app", "PGUSER")));
    assert_eq!(of("app", "PGPORT"), config.listen.listen_port.to_string());
    assert_eq!((config.listen.listen_addr.as_str(), &*of("app", "PGHOST")), ("0.0.0.0", "pgweir"));
    let build = &compose["pgweir"]["build"];
    let dockerfile =
        shipped("platforms").join(build["context"].as_str().unwrap()).join(build["dockerfile"].as_str().unwrap());
    assert_eq!(dockerfile.canonicalize().unwrap(), shipped("platforms/Dockerfile").canonicalize().unwrap());
    let grace: u64 = compose["pgweir"]["stop_grace_period"].as_str().unwrap().trim_end_matches('s').parse().unwrap();
    assert!(grace > config.process.shutdown_timeout.as_secs());
}

#[test]
fn the_manifest_is_a_native_sidecar_and_its_time_is_long_enough() {
    let manifest = &yaml(&text("platforms/kubernetes.yaml"))[0];
    assert_eq!((&manifest["apiVersion"], &manifest["kind"]), (&"apps/v1".into(), &"Deployment".into()));
    let pod = &manifest["spec"]["template"]["spec"];
    let sidecar = &pod["initContainers"][0];
    assert_eq!(sidecar["restartPolicy"], "Always");
    for (probe, path) in [("startupProbe", "/healthz"), ("livenessProbe", "/healthz")] {
        assert_eq!(sidecar[probe]["exec"]["command"], serde_json::json!(["pgweir-probe", path]), "{probe}");
    }
    let secret = |name: &str| match name {
        "DATABASE_URL" => "postgres://app:a-secret-of-kubernetes@db.internal:5432/app?sslmode=require",
        _ => "a-secret-of-kubernetes",
    };
    let mut env = Vec::new();
    for variable in sidecar["env"].as_array().unwrap() {
        let name = variable["name"].as_str().unwrap();
        let value = match variable["value"].as_str() {
            Some(value) => env.iter().fold(value.to_owned(), |value, (name, known): &(String, String)| {
                value.replace(&format!("$({name})"), known)
            }),
            None if variable["valueFrom"].get("secretKeyRef").is_some() => secret(name).to_owned(),
            None => panic!("{name} comes from nowhere"),
        };
        assert!(!value.contains("$("), "{name} names a variable that stands behind it: {value}");
        env.push((name.to_owned(), value));
    }
    let config = config_of(&env);
    assert!(config.fleet.fleet_budget && config.databases.contains_key("app") && config.users.contains_key("app"));
    // The application's URL leads to it.
    let app = pod["containers"][0]["env"].as_array().unwrap();
    let url = app.iter().find(|one| one["name"] == "DATABASE_URL").unwrap()["value"].as_str().unwrap();
    assert!(url.ends_with(&format!("@127.0.0.1:{}/app", config.listen.listen_port)), "{url}");
    let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
    let before = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap();
    assert!(grace >= before + 30 + config.process.shutdown_timeout.as_secs(), "{grace} s");
}

#[test]
fn the_units_are_what_systemd_understands() {
    let folder = Folder::new();
    for name in ["pgweir.service", "app-with-pgweir.service"] {
        let unit = text(&format!("platforms/{name}"));
        let value = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).unwrap();
        assert_eq!(value("KillMode"), "mixed", "{name}");
        // Nothing here tells systemd that it is ready.
        assert_eq!(value("Type"), "exec", "{name}");
        let timeout: u64 = value("TimeoutStopSec").parse().unwrap();
        assert!(timeout > Config::default().process.shutdown_timeout.as_secs(), "{name}");
        let here = unit.replace("/usr/local/bin/pgweir", env!("CARGO_BIN_EXE_pgweir"));
        let path = folder.write(name, &here);
        match clean("systemd-analyze").arg("verify").arg("--man=no").arg(&path).output() {
            Ok(output) => {
                let said = both(&output);
                assert!(output.status.success() && !said.contains(name), "{said}");
            }
            Err(error) => eprintln!("systemd-analyze: {error}: {name} is not verified here"),
        }
    }
}

#[test]
fn the_dockerfile_copies_what_there_is_and_builds_with_the_right_toolchain() {
    let file = text("platforms/Dockerfile");
    let root = shipped("..");
    for line in file.lines().filter(|line| line.starts_with("COPY") && !line.contains("--from=")) {
        let source = line.split_whitespace().rfind(|word| !word.starts_with('/')).unwrap();
        assert!(root.join(source).exists(), "{line}");
    }
    let manifest: toml::Table = fs::read_to_string(root.join("Cargo.toml")).unwrap().parse().unwrap();
    let version = manifest["workspace"]["package"]["rust-version"].as_str().unwrap();
    assert!(file.contains(&format!("FROM rust:{version}-")), "rust-version is {version}");
    assert!(file.contains("--no-default-features --features grammar"), "{file}");
}

#[tokio::test]
async fn the_probe_tells_by_its_exit_code() {
    let site = Site::start(&[]);
    let port = site.pgweir.http_port().unwrap();
    let probe = |path: &str, at: &str| {
        let status =
            clean(shipped("platforms/pgweir-probe")).arg(path).env("PGWEIR_HTTP_LISTEN", at).output().unwrap().status;
        status.code().unwrap()
    };
    let here = format!("127.0.0.1:{port}");
    wait_until(SOON, || probe("/readyz", &here) == 0);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    #[rustfmt::skip]
    let table = [
        ("healthy",               "/healthz", here.clone(),              0),
        ("listening everywhere",  "/healthz", format!("0.0.0.0:{port}"), 0),
        ("no such endpoint",      "/nowhere", here.clone(),              1),
        ("nobody there",          "/healthz", nobody.to_string(),        1),
    ];
    for (name, path, at, want) in table {
        assert_eq!(probe(path, &at), want, "{name}");
    }
}

/// The expressions of the dashboard and the alerts, each with where it stands.
fn expressions() -> Vec<(String, String)> {
    let mut all = Vec::new();
    let dashboard: Value = serde_json::from_str(&text("monitoring/grafana.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let title = panel["title"].as_str().unwrap();
        assert!(!panel["description"].as_str().unwrap().is_empty(), "{title}");
        for target in panel["targets"].as_array().unwrap() {
            all.push((title.to_owned(), target["expr"].as_str().unwrap().to_owned()));
        }
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        if let Some(query) = variable["query"]["query"].as_str() {
            all.push((variable["name"].to_string(), query.to_owned()));
        }
    }
    for rule in yaml(&text("monitoring/alerts.yaml"))[0]["groups"][0]["rules"].as_array().unwrap() {
        let name = rule["alert"].as_str().unwrap();
        assert!(["warning", "critical"].contains(&rule["labels"]["severity"].as_str().unwrap()), "{name}");
        assert!(rule["annotations"]["summary"].is_string() && rule["annotations"]["description"].is_string(), "{name}");
        all.push((name.to_owned(), rule["expr"].as_str().unwrap().to_owned()));
    }
    all
}

#[tokio::test]
async fn every_metric_and_label_of_the_dashboard_and_the_alerts_is_in_a_real_answer() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let mut client = site.client().await;
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    assert_eq!(client.query("SELECT 1/0").await.unwrap().sqlstate(), "22012");
    wait_until(SOON, || site.pgweir.http_get("/metrics").unwrap().1.contains("sqlstate=\"22012\""));
    let (_, answer) = site.pgweir.http_get("/metrics").unwrap();
    let series: Vec<&str> = answer.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
    let labels_of = |metric: &str| -> BTreeSet<String> {
        let own = series.iter().filter_map(|line| line.strip_prefix(metric)?.strip_prefix('{'));
        own.flat_map(|rest| {
            rest.split('}').next().unwrap().split("\",").map(|pair| pair.split('=').next().unwrap().to_owned())
        })
        .collect()
    };
    // From the scrape.
    let given = ["instance".to_owned()];
    let expressions = expressions();
    assert!(expressions.len() > 40);
    for (place, expression) in expressions {
        let metrics: BTreeSet<&str> = words(&expression).filter(|word| word.starts_with("pgweir_")).collect();
        assert!(!metrics.is_empty(), "{place}: {expression}");
        let mut labels: BTreeSet<String> = given.clone().into();
        for metric in metrics {
            let is_there = |line: &&str| line.strip_prefix(metric).is_some_and(|rest| rest.starts_with(['{', ' ']));
            assert!(series.iter().any(is_there), "{place}: there is no {metric}");
            labels.extend(labels_of(metric));
        }
        let open = expression.matches(['(', '{', '[']).count();
        assert_eq!(open, expression.matches([')', '}', ']']).count(), "{place}: {expression}");
        let grouped = expression.split("by (").skip(1).flat_map(|rest| words(rest.split(')').next().unwrap()));
        let selected = expression.split('{').skip(1).flat_map(|rest| {
            let inside = rest.split('}').next().unwrap();
            inside.split(',').map(|pair| pair.split(['=', '!']).next().unwrap().trim())
        });
        for label in grouped.chain(selected) {
            assert!(labels.contains(label), "{place}: no label {label} in {labels:?}: {expression}");
        }
    }
}

#[test]
fn the_readme_of_the_folder_names_every_file_and_none_that_is_not_there() {
    let readme = text("README.md");
    let links: BTreeSet<&str> = readme.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()).collect();
    for link in &links {
        assert!(shipped(link).exists(), "{link}");
    }
    for file in files_of(&["platforms", "monitoring"]) {
        let name = file.rsplit('/').next().unwrap();
        assert!(links.contains(&*file) || readme.contains(name) || name.ends_with(".dockerignore"), "{file}");
    }
}
