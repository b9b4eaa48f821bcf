//! Every `auth_type` with every kind of secret, and where secrets come from.

use pgweir_harness::{Pgweir, wait_until_async};

use super::{UserFile, conninfo, libpq, refusal, stored};
use crate::support::{PASSWORD, Place, SOON, Site, assert_value, options, primary};

#[tokio::test]
async fn libpq_is_asked_by_the_method_that_goes_with_auth_type_and_secret() {
    let place = Place::on(primary());
    let md5 = stored(&place, "md5");
    let scram = stored(&place, "scram-sha-256");
    let plain = PASSWORD.to_owned();
    #[rustfmt::skip]
    let table = [
        ("scram-sha-256", &plain, "scram-sha-256"),
        ("scram-sha-256", &scram, "scram-sha-256"),
        ("md5",           &plain, "md5"),
        ("md5",           &md5,   "md5"),
        ("md5",           &scram, "scram-sha-256"),
        ("plain",         &plain, "password"),
        ("plain",         &md5,   "password"),
        ("plain",         &scram, "password"),
        ("trust",         &plain, "none"),
        ("any",           &plain, "none"),
    ];
    for (auth_type, secret, method) in table {
        let settings = [("auth_type", auth_type), ("users.PLACE.password", secret), ("auth_plain_without_tls", "true")];
        let site = Site::before(place.clone(), &settings);
        let others = ["scram-sha-256", "md5", "password", "none"].into_iter().filter(|other| *other != method);
        let others: Vec<String> = others.collect::<Vec<_>>().iter().map(|other| format!("!{other}")).collect();
        let right = format!("password={PASSWORD}");
        let asked = libpq(&[
            conninfo(&site, &format!("{right} require_auth={method}")),
            conninfo(&site, &format!("{right} require_auth={}", others.join(","))),
            conninfo(&site, &format!("{right} require_auth=!{method}")),
            conninfo(&site, "password=wrong"),
            conninfo(&site, "user=nobody-here password=wrong"),
        ]);
        let ok = format!("ok {}", site.name());
        let case = format!("{auth_type} {}", &secret[..5]);
        assert_eq!(&asked[..2], [ok.clone(), ok.clone()], "{case}");
        assert!(asked[2].contains("authentication method requirement"), "{case}: {}", asked[2]);
        if method == "none" {
            // The database's user stands for everyone.
            assert_eq!(&asked[3..], [ok.clone(), ok], "{case}");
        } else {
            let failed = |user: &str| format!("FATAL: password authentication failed for user \"{user}\"");
            assert!(asked[3].ends_with(&failed(site.name())), "{case}: {}", asked[3]);
            assert!(asked[4].ends_with(&failed("nobody-here")), "{case}: {}", asked[4]);
        }
    }
}

#[tokio::test]
async fn an_md5_secret_cannot_be_checked_by_scram_and_that_shows_to_nobody_outside() {
    let place = Place::on(primary());
    let md5 = stored(&place, "md5");
    stored(&place, "scram-sha-256");
    let file = UserFile::new(&format!("\"{}\" \"{md5}\"\n", place.name));
    let toml = place.toml(&[("auth_type", "scram-sha-256"), ("auth_file", &file.path())]);
    let own = format!("[users.{}]", place.name);
    let toml: String =
        toml.split("\n\n").filter(|table| !table.trim_start().starts_with(&own)).collect::<Vec<_>>().join("\n\n");
    let pgweir = Pgweir::start_with(options(toml)).unwrap();
    let error = refusal(pgweir.addr(), &place.name, &place.name, PASSWORD).await;
    let want = refusal(pgweir.addr(), "nobody-here", &place.name, PASSWORD).await;
    assert_eq!(error.message().replace(&place.name, "nobody-here"), want.message());
    assert_eq!(error.sqlstate(), "28P01");
}

#[tokio::test]
async fn a_password_in_clear_is_asked_for_only_where_nobody_can_read_it_or_by_leave() {
    let site = Site::start(&[("auth_type", "plain")]);
    let error = refusal(site.pgweir.addr(), site.name(), site.name(), PASSWORD).await;
    assert_eq!((error.severity(), error.sqlstate()), ("FATAL", "28000"), "{error}");
    assert!(error.to_string().contains("auth_plain_without_tls"), "{error}");
    let site = Site::start(&[("auth_type", "plain"), ("auth_plain_without_tls", "true")]);
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    let error = refusal(site.pgweir.addr(), site.name(), site.name(), "").await;
    let want = ("28P01", "empty password returned by client");
    assert_eq!((error.sqlstate(), error.message()), want);
}

#[tokio::test]
async fn users_come_from_auth_file_and_its_changes_hold_at_once() {
    let place = Place::on(primary());
    let other = format!("{}_other", place.name);
    let line = |name: &str, secret: &str| format!("\"{name}\" \"{secret}\"\n");
    let file = UserFile::new(&format!("; users\n{}", line(&other, "first-secret")));
    let site = Site::before(place, &[("auth_type", "scram-sha-256"), ("auth_file", &file.path())]);
    let enter = async |password: &str| {
        let mut wire = pgweir_harness::wire::Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.login(&other, site.name(), password).await.is_ok()
    };
    assert!(enter("first-secret").await);
    // Those of the configuration stay, and win.
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    file.write(&(line(&other, "second-secret") + &line(site.name(), "not-this-secret")));
    wait_until_async(SOON, async || enter("second-secret").await).await;
    assert!(!enter("first-secret").await);
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    // A faulty file is reported and changes nothing.
    let from = site.pgweir.log().len();
    file.write(&(line(&other, "hush-third") + "hush-fourth\n"));
    let told = site.pgweir.wait_log_from(from, "auth_file not read", SOON).unwrap();
    assert!(told.contains("users.txt:2") && told.contains("in double quotes"), "{told}");
    assert!(enter("second-secret").await);
    // So is a file that is gone.
    std::fs::remove_file(file.path()).unwrap();
    site.pgweir.wait_log_from(from, "cannot be read", SOON).unwrap();
    assert!(enter("second-secret").await);
    // Who is left out is out.
    file.write("");
    wait_until_async(SOON, async || !enter("second-secret").await).await;
    let from = site.pgweir.log().len();
    site.pgweir.signal(libc::SIGHUP).unwrap();
    site.pgweir.wait_log_from(from, "users=0", SOON).unwrap();
    assert!(!site.pgweir.log().contains("hush"), "a secret is in the log");
}

#[test]
fn a_faulty_auth_file_is_told_line_by_line_and_nothing_starts() {
    let place = Place::on(primary());
    let file = UserFile::new("\"a\" \"hush\"\n\"a\" \"hush\"\nb hush\n\"c\" \"SCRAM-SHA-256$1:hush\"\n");
    let path = file.path();
    let started = Pgweir::start_with(options(place.toml(&[("auth_file", &path)])));
    let told = started.unwrap_err().to_string();
    for (line, words) in [(2, "given twice"), (3, "in double quotes"), (4, "verifier")] {
        let place = format!("users.txt:{line})");
        assert!(told.lines().any(|told| told.contains(&place) && told.contains(words)), "{line}: {told}");
    }
    assert!(!told.contains("hush"), "{told}");
    let missing = Pgweir::start_with(options(place.toml(&[("auth_file", "/nowhere/users.txt")])));
    assert!(missing.unwrap_err().to_string().contains("/nowhere/users.txt"));
}

#[test]
fn a_map_says_whom_a_user_of_the_system_may_log_in_as() {
    let place = Place::on(primary());
    let directory = tempfile::TempDir::new().unwrap();
    let (folder, file) = (directory.path().to_str().unwrap(), directory.path().join("ident.conf"));
    let output = std::process::Command::new("id").arg("-un").output().unwrap();
    let me = String::from_utf8(output.stdout).unwrap();
    let me = me.trim();
    let start = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let settings = [
            ("auth_type", "peer"),
            ("unix_socket_dir", folder),
            ("auth_ident_file", file.to_str().unwrap()),
            ("auth_ident_map", "m"),
        ];
        Pgweir::start_with(options(place.toml(&settings)))
    };
    let name = &place.name;
    let (rest, last) = name.split_at(name.len() - 1);
    #[rustfmt::skip]
    let table = [
        ("named",          format!("m {me} {name}"),                  true),
        ("everyone",       "m /. all".to_owned(),                       true),
        ("by expression",  format!("m /^{me}$ /^{rest}.$"),           true),
        ("another user",   format!("m {me} {rest}"),                  false),
        ("another map",    format!("n {me} {name}"),                  false),
        ("another system", format!("m {me}x {name}\nm {last} all"),   false),
        ("nothing",        String::new(),                             false),
    ];
    for (case, text, want) in table {
        let pgweir = start(&text).unwrap();
        let conninfo = format!("host={folder} port={} user={name} dbname={name}", pgweir.port());
        let said = libpq(&[conninfo]).remove(0);
        assert_eq!(said == format!("ok {name}"), want, "{case}: {said}");
        assert!(want || said.contains("Peer authentication failed for user"), "{case}: {said}");
    }
    let told = start("m a\nm /( b\n").unwrap_err().to_string();
    assert!(told.contains("ident.conf:1") && told.contains("ident.conf:2"), "{told}");
}
