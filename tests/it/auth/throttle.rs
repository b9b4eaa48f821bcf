//! The limit on failed logins: it holds for whoever guesses, one by one or side by side, and for nobody else.

use std::time::Instant;

use futures_util::future::join_all;
use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::{password, sasl, sasl_initial};
use pgweir_harness::{Pgweir, pgweir_toml, wait_until, wait_until_async};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};

use super::refusal;
use crate::support::{PASSWORD, Place, SOON, Site, assert_value, options, primary};

#[tokio::test]
async fn whoever_guesses_is_slowed_down_and_nobody_else_is() {
    let settings = [("auth_type", "scram-sha-256"), ("login_failure_rate", "1"), ("login_failure_burst", "5")];
    let site = Site::start(&settings);
    let guess = async || refusal(site.pgweir.addr(), "someone", site.name(), "wrong").await;
    let start = std::time::Instant::now();
    let mut codes = Vec::new();
    for _ in 0..20 {
        codes.push(guess().await.sqlstate().to_owned());
    }
    let wrong = codes.iter().filter(|code| *code == "28P01").count();
    let most = 5 + usize::try_from(start.elapsed().as_secs()).unwrap() + 1;
    assert!((5..=most).contains(&wrong), "{codes:?}");
    let refused = guess().await;
    let told = refused.to_string();
    assert_eq!((refused.severity(), refused.sqlstate()), ("FATAL", "53400"), "{told}");
    assert!(told.contains("127.0.0.1") && told.contains("login_failure_rate"), "{told}");
    // Another user at the same address is not kept out by that.
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    wait_until_async(SOON, async || guess().await.sqlstate() == "28P01").await;
    wait_until(SOON, || site.metric("pgweir_clients_refused_total", &["reason=\"login_failures\""]) >= 10.0);
}

/// A client that has gone through the exchange as far as it goes without a proof, and the message with its proof.
async fn before_its_proof(site: &Site<'_>, user: &str, secret: &str) -> (Wire, Vec<u8>) {
    let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
    wire.startup(&[("user", user), ("database", site.name())]).await.unwrap();
    let (kind, data) = wire.recv().await.unwrap().authentication().unwrap();
    let proof = match kind {
        3 => password(secret),
        5 => {
            let salt = data.try_into().unwrap();
            password(&postgres_protocol::authentication::md5_hash(user.as_bytes(), secret.as_bytes(), salt))
        }
        _ => {
            let mut scram = ScramSha256::new(secret.as_bytes(), ChannelBinding::unsupported());
            wire.send(&sasl_initial("SCRAM-SHA-256", scram.message())).await.unwrap();
            let (_, data) = wire.recv().await.unwrap().authentication().unwrap();
            scram.update(&data).unwrap();
            sasl(scram.message())
        }
    };
    (wire, proof)
}

#[tokio::test]
async fn guesses_side_by_side_are_no_more_than_one_after_the_other() {
    for auth_type in ["scram-sha-256", "md5", "plain"] {
        let settings = [
            ("auth_type", auth_type),
            ("auth_plain_without_tls", "true"),
            ("login_failure_rate", "1"),
            ("login_failure_burst", "5"),
        ];
        let site = Site::start(&settings);
        // All are asked before anyone has failed; the last of them knows the password.
        let mut clients = Vec::new();
        for n in 0..40 {
            let secret = if n == 39 { PASSWORD } else { "wrong" };
            clients.push(before_its_proof(&site, site.name(), secret).await);
        }
        let start = Instant::now();
        for (wire, proof) in &mut clients[..39] {
            wire.send(proof).await.unwrap();
        }
        let answers =
            clients[..39].iter_mut().map(async |(wire, _)| wire.recv().await.unwrap().server_error().unwrap());
        let answers = join_all(answers).await;
        let (mut right, proof) = clients.pop().unwrap();
        right.send(&proof).await.unwrap();
        let told = right.recv().await.unwrap();
        let took = start.elapsed();
        let wrong = answers.iter().filter(|error| error.sqlstate() == "28P01").count();
        let most = 5 + usize::try_from(took.as_secs()).unwrap() + 1;
        assert!((5..=most).contains(&wrong), "{auth_type}: {wrong} in {took:?}");
        assert!(answers.iter().all(|error| matches!(error.sqlstate(), "28P01" | "53400")), "{auth_type}: {answers:?}");
        if took.as_millis() < 900 {
            // Whether that was right stays open, too.
            let told = told.server_error().unwrap_or_else(|| panic!("{auth_type}: {told:?}"));
            assert_eq!(told.sqlstate(), "53400", "{auth_type}");
        }
        wait_until_async(SOON, async || {
            let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
            wire.login(site.name(), site.name(), PASSWORD).await.is_ok()
        })
        .await;
    }
}

#[tokio::test]
async fn many_who_know_the_password_are_not_in_each_others_way() {
    let settings = [("auth_type", "scram-sha-256"), ("login_failure_rate", "1"), ("login_failure_burst", "1")];
    let site = Site::start(&settings);
    let logins = join_all((0..60).map(|_| site.client())).await;
    assert_eq!(logins.len(), 60);
}

#[tokio::test]
async fn whoever_has_databases_looked_for_that_are_not_there_is_slowed_down() {
    let place = Place::on(primary());
    let auth = format!("{}_auth", place.name);
    place.psql(&format!("CREATE ROLE {auth} LOGIN SUPERUSER PASSWORD 'auth-secret'"));
    let (port, key) = (place.cluster.port().to_string(), format!("users.{auth}.password"));
    let settings = [
        ("auth_type", "scram-sha-256"),
        ("databases.\"*\".host", place.cluster.host()),
        ("databases.\"*\".port", port.as_str()),
        ("auth_user", auth.as_str()),
        (key.as_str(), "auth-secret"),
        ("login_failure_rate", "1"),
        ("login_failure_burst", "3"),
        ("max_server_logins", "1"),
    ];
    let pgweir = Pgweir::start_with(options(pgweir_toml(place.cluster, &settings))).unwrap();
    let start = Instant::now();
    let mut codes = Vec::new();
    for n in 0..20 {
        let error = refusal(pgweir.addr(), "x", &format!("{}_none_{n}", place.name), "x").await;
        assert!(!error.to_string().contains("_none_"), "{error}");
        codes.push(error.sqlstate().to_owned());
    }
    let asked = codes.iter().filter(|code| *code == "57P03").count();
    let most = 3 + usize::try_from(start.elapsed().as_secs()).unwrap() + 1;
    assert!((3..=most).contains(&asked), "{codes:?}");
    assert!(codes.iter().all(|code| matches!(code.as_str(), "57P03" | "53400")), "{codes:?}");
    let refused = place.cluster.log_text().matches(&format!("database \"{}_none_", place.name)).count();
    assert!(refused <= asked, "{refused} server logins for {asked} clients");
    // Somebody else who is there gets in at once.
    let mut wire = Wire::connect(pgweir.addr()).await.unwrap();
    wire.login(&place.name, &place.name, PASSWORD).await.unwrap();
}
