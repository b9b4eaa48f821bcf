//! What a client proves itself by opens the server, too, where no password is configured for it.

use pgweir_harness::wire::{Wire, WireError};
use pgweir_harness::{Auth, Cluster, ClusterOptions, Pgweir, pgweir_toml, wait_until_async};

use super::{UserFile, refusal, stored};
use crate::support::{PASSWORD, Place, SOON, assert_value, options, primary};

/// A pgweir before a place, whose configuration has no user and no password for the server.
fn start(place: &Place<'_>, settings: &[(&str, &str)]) -> Pgweir {
    let port = place.cluster.port().to_string();
    let fixed = [
        ("auth_type", "scram-sha-256"),
        ("databases.PLACE.host", place.cluster.host()),
        ("databases.PLACE.port", &port),
    ];
    let named: Vec<(String, &str)> =
        fixed.iter().chain(settings).map(|(key, value)| (key.replace("PLACE", &place.name), *value)).collect();
    let named: Vec<(&str, &str)> = named.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    Pgweir::start_with(options(pgweir_toml(place.cluster, &named))).unwrap()
}

async fn enter(pgweir: &Pgweir, place: &Place<'_>, password: &str) -> Result<Wire, WireError> {
    let mut wire = Wire::connect(pgweir.addr()).await?;
    wire.login(&place.name, &place.name, password).await?;
    Ok(wire)
}

#[tokio::test]
async fn the_proof_of_a_client_opens_a_server_with_the_same_verifier_wherever_that_comes_from() {
    let place = Place::on(primary());
    let auth = format!("{}_auth", place.name);
    place.psql(&format!("CREATE ROLE {auth} LOGIN SUPERUSER PASSWORD 'auth-secret'"));
    let verifier = stored(&place, "scram-sha-256");
    let file = UserFile::new(&format!("\"{}\" \"{verifier}\"\n\"{auth}\" \"auth-secret\"\n", place.name));
    let path = file.path();
    let key = format!("users.{auth}.password");
    #[rustfmt::skip]
    let table: [(&str, Vec<(&str, &str)>); 4] = [
        ("configuration",             vec![("users.PLACE.password", &verifier)]),
        ("file",                      vec![("auth_file", &path)]),
        ("query",                     vec![("auth_user", &auth), (&key, "auth-secret")]),
        ("query of a user of a file", vec![("auth_user", &auth), ("auth_file", &path), ("databases.PLACE.pool_size", "2")]),
    ];
    for (case, settings) in table {
        let pgweir = start(&place, &settings);
        // The first login is the one that brings the keys.
        let mut one = enter(&pgweir, &place, PASSWORD).await.unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_value(&one.query("SELECT session_user").await.unwrap(), &place.name);
        // Further server connections need no further login: two at once, and one in place of another.
        let mut two = enter(&pgweir, &place, PASSWORD).await.unwrap();
        assert_value(&one.query("BEGIN; SELECT 1").await.unwrap(), "1");
        assert_value(&two.query("SELECT session_user").await.unwrap(), &place.name);
        one.query("COMMIT").await.unwrap();
        place
            .cluster
            .psql(
                "postgres",
                &format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{}'", place.name),
            )
            .unwrap();
        wait_until_async(SOON, async || {
            let Ok(mut three) = enter(&pgweir, &place, PASSWORD).await else { return false };
            three.query("SELECT 1").await.is_ok_and(|outcome| outcome.value() == Some("1"))
        })
        .await;
        assert_eq!(refusal(pgweir.addr(), &place.name, &place.name, "wrong").await.sqlstate(), "28P01", "{case}");
        assert!(!pgweir.log().contains("SCRAM-SHA-256$") && !pgweir.log().contains("auth-secret"), "{case}");
    }
}

#[tokio::test]
async fn another_verifier_on_the_server_is_told_plainly_and_mended_by_the_next_that_fits() {
    let place = Place::on(primary());
    let old = stored(&place, "scram-sha-256");
    // The same password under another salt: the keys are others.
    let new = stored(&place, "scram-sha-256");
    assert_ne!(old, new);
    let file = UserFile::new(&format!("\"{}\" \"{old}\"\n", place.name));
    let pgweir = start(&place, &[("auth_file", &file.path()), ("server_login_retry", "1h")]);
    let error = refusal(pgweir.addr(), &place.name, &place.name, PASSWORD).await;
    assert!(error.to_string().contains("another SCRAM verifier"), "{error}");
    pgweir.wait_log("another SCRAM verifier", SOON).unwrap();
    file.write(&format!("\"{}\" \"{new}\"\n", place.name));
    wait_until_async(SOON, async || enter(&pgweir, &place, PASSWORD).await.is_ok()).await;
}

#[tokio::test]
async fn a_password_changed_on_the_server_is_carried_there_by_the_client_who_knows_it() {
    let place = Place::on(primary());
    let auth = format!("{}_auth", place.name);
    place.psql(&format!("CREATE ROLE {auth} LOGIN SUPERUSER PASSWORD 'auth-secret'"));
    let key = format!("users.{auth}.password");
    let settings = [("auth_user", auth.as_str()), (&key, "auth-secret"), ("server_login_retry", "1h")];
    let pgweir = start(&place, &settings);
    assert!(enter(&pgweir, &place, PASSWORD).await.is_ok());
    place.psql(&format!("ALTER ROLE {} PASSWORD 'second-secret'", place.name));
    place
        .cluster
        .psql(
            "postgres",
            &format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{}'", place.name),
        )
        .unwrap();
    wait_until_async(SOON, async || enter(&pgweir, &place, "second-secret").await.is_ok()).await;
    let mut client = enter(&pgweir, &place, "second-secret").await.unwrap();
    assert_value(&client.query("SELECT session_user").await.unwrap(), &place.name);
    assert!(enter(&pgweir, &place, PASSWORD).await.is_err());
}

#[tokio::test]
async fn a_password_that_a_client_sends_and_an_md5_hash_open_the_server_likewise() {
    let place = Place::on(primary());
    let verifier = stored(&place, "scram-sha-256");
    let settings = [("auth_type", "plain"), ("auth_plain_without_tls", "true"), ("users.PLACE.password", &verifier)];
    let pgweir = start(&place, &settings);
    let mut client = enter(&pgweir, &place, PASSWORD).await.unwrap();
    assert_value(&client.query("SELECT session_user").await.unwrap(), &place.name);

    let cluster = Cluster::start(ClusterOptions::auth(Auth::Md5)).unwrap();
    let place = Place::on(&cluster);
    let hash = stored(&place, "md5");
    let pgweir = start(&place, &[("auth_type", "md5"), ("users.PLACE.password", &hash)]);
    let mut client = enter(&pgweir, &place, PASSWORD).await.unwrap();
    assert_value(&client.query("SELECT session_user").await.unwrap(), &place.name);
    // What is asked for is more than what is known.
    let verifier = stored(&place, "scram-sha-256");
    stored(&place, "md5");
    let pgweir = start(&place, &[("users.PLACE.password", &verifier)]);
    let error = refusal(pgweir.addr(), &place.name, &place.name, PASSWORD).await;
    assert!(error.to_string().contains("the keys of its SCRAM verifier"), "{error}");
}

#[tokio::test]
async fn whoever_is_merely_believed_brings_nothing_to_the_server() {
    let place = Place::on(primary());
    let verifier = stored(&place, "scram-sha-256");
    let pgweir = start(&place, &[("auth_type", "trust"), ("users.PLACE.password", &verifier)]);
    let error = refusal(pgweir.addr(), &place.name, &place.name, PASSWORD).await;
    assert!(error.to_string().contains("asks for a password"), "{error}");
}

#[tokio::test]
async fn what_a_client_proves_itself_by_opens_nothing_for_the_user_that_the_database_forces_on_it() {
    let place = Place::on(primary());
    let forced = format!("{}_forced", place.name);
    // The same password: on the server it would do.
    place.psql(&format!("CREATE ROLE {forced} LOGIN PASSWORD '{PASSWORD}'"));
    let verifier = stored(&place, "scram-sha-256");
    let settings = [
        ("auth_type", "plain"),
        ("auth_plain_without_tls", "true"),
        ("users.PLACE.password", verifier.as_str()),
        ("databases.PLACE.user", &forced),
    ];
    let pgweir = start(&place, &settings);
    let error = refusal(pgweir.addr(), &place.name, &place.name, PASSWORD).await;
    assert!(error.to_string().contains(&format!("none is configured for user \"{forced}\"")), "{error}");
}
