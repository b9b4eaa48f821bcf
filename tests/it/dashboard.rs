//! The dashboard, in a real browser: on a phone and on a desk, light and dark, with figures, without, and when they do not
//! come any more.

pub(crate) mod browser;

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::query;
use pgweir_harness::{ClusterOptions, Pgweir, secrets};

use crate::support::{PASSWORD, Place, SOON, Site, assert_value, primary, start_pgweir};
use browser::Browser;

/// What the second test asks for.
const TOKEN: &str = "the-token-of-the-dashboards-test";

/// A browser wants a core of its own.
static ALONE: Mutex<()> = Mutex::new(());

/// Name, width, height and colours of the windows that it is looked at in.
const WINDOWS: [(&str, u32, u32, &str); 4] = [
    ("phone-light", 390, 844, "light"),
    ("phone-dark", 390, 844, "dark"),
    ("desk-light", 1440, 900, "light"),
    ("desk-dark", 1440, 900, "dark"),
];

/// Where the pictures are, for people to look at.
fn keep(name: &str, picture: &[u8]) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("dashboard");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(name).with_extension("png"), picture).unwrap();
}

fn url(pgweir: &Pgweir) -> String {
    format!("http://127.0.0.1:{}/", pgweir.http_port().unwrap())
}

/// Nothing came from elsewhere, nothing was forbidden or failed, and nothing secret is on the page.
#[track_caller]
fn assert_well(browser: &mut Browser, url: &str) {
    let elsewhere: Vec<String> =
        browser.requests().into_iter().filter(|asked| !asked.starts_with(url) && !asked.starts_with("data:")).collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
    assert_eq!(browser.complaints(), Vec::<String>::new());
    let text = browser.evaluate("document.documentElement.outerHTML");
    secrets::assert_none_in("the dashboard", text.as_str().unwrap());
}

/// Nothing sticks out to the right, and nothing has moved once it was there.
#[track_caller]
fn assert_fits(browser: &mut Browser, name: &str) {
    let wide = "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 \
                && !e.closest('.scroll') && !e.closest('svg')).map((e) => e.outerHTML.slice(0, 100))";
    assert_eq!(browser.evaluate(wide), serde_json::json!([]), "{name}");
    assert_eq!(browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), true, "{name}");
}

fn assert_still(browser: &mut Browser, name: &str) {
    assert_fits(browser, name);
    let shifted = browser.evaluate("window.shifted").as_f64().unwrap();
    assert!(shifted < 0.02, "{name}: what was there has moved by {shifted}");
}

#[tokio::test]
async fn it_draws_the_limits_the_series_and_the_holders_in_every_window() {
    let place = Place::on(primary());
    place.psql(&format!("ALTER ROLE {} CONNECTION LIMIT 20", place.name));
    let settings = [("fleet_budget", "true"), ("fleet_census_period", "500ms"), ("default_pool_size", "4")];
    let of = |name: &'static str| start_pgweir(place.toml(&[&settings[..], &[("fleet_name", name)]].concat()));
    let (pgweir, peer) = (of("web.1"), of("web.2"));
    let client = async |pgweir: &Pgweir, name: &str| {
        let mut client = Wire::connect(pgweir.addr()).await.unwrap();
        let parameters = [("user", &*place.name), ("database", &*place.name), ("application_name", name)];
        client.login_with(&parameters, PASSWORD).await.unwrap();
        client
    };
    let mut foreigner = Wire::connect(place.cluster.addr()).await.unwrap();
    let parameters = [("user", &*place.name), ("database", &*place.name), ("application_name", "reporting")];
    foreigner.login_with(&parameters, PASSWORD).await.unwrap();
    let mut holders = Vec::new();
    for (pgweir, name) in [(&pgweir, "puma: worker 1"), (&peer, "sidekiq"), (&peer, "sidekiq")] {
        let mut holder = client(pgweir, name).await;
        assert_eq!(holder.query("BEGIN").await.unwrap().status, b'T');
        holders.push(holder);
    }
    // Clients that keep it busy: four want two connections.
    let busy: Vec<_> = (0..5)
        .map(|_| {
            let (address, name) = (pgweir.addr(), place.name.clone());
            tokio::spawn(async move {
                let mut client = Wire::connect(address).await.unwrap();
                let parameters =
                    [("user", &*name), ("database", &*name), ("application_name", "rake import:everything")];
                client.login_with(&parameters, PASSWORD).await.unwrap();
                while client.query("SELECT 1 FROM pg_sleep(0.02)").await.is_ok() {}
            })
        })
        .collect();
    // The browser is waited for on a thread of its own.
    tokio::task::spawn_blocking(move || look(pgweir)).await.unwrap();
    for client in busy {
        client.await.unwrap();
    }
}

/// Looks at a pgweir that is busy, and then at one that is gone.
fn look(pgweir: Pgweir) {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let url = url(&pgweir);
    let mut browser = Browser::start();
    for (name, width, height, scheme) in WINDOWS {
        browser.resize(width, height, scheme);
        browser.open(&url);
        browser.until(
            "document.querySelector('#state')?.textContent === 'live' && !document.querySelector('#main').hidden",
        );
        browser.until("document.querySelectorAll('#limits .bar').length >= 2 && document.querySelectorAll('#holders tr').length >= 1");
        browser.until(
            "[...document.querySelectorAll('.line')].some((path) => (path.getAttribute('d') || '').includes('L'))",
        );
        browser.until(
            "/ 2 of peers, 1 of others/.test(document.querySelector('#limits .bar').getAttribute('aria-label'))",
        );
        let text = browser.evaluate("document.body.innerText");
        let text = text.as_str().unwrap();
        for part in ["role place", "of 20 used", "binds", "open transaction", "puma: worker 1", "Throughput", "per s"] {
            assert!(text.contains(part), "{name}: {part} is not in {text}");
        }
        assert_eq!(browser.evaluate("document.querySelector('#followers').hidden"), true, "{name}: there are none");
        // The parts of the bar are as wide as their numbers are large.
        let widths =
            "[...document.querySelector('#limits .bar').children].map((part) => part.getBoundingClientRect().width)";
        let widths: Vec<f64> =
            browser.evaluate(widths).as_array().unwrap().iter().filter_map(serde_json::Value::as_f64).collect();
        assert!(widths.len() == 5 && widths[3] > widths[2] && widths[2] > 5.0, "{name}: {widths:?}");
        thread::sleep(Duration::from_millis(300));
        assert_still(&mut browser, name);
        keep(name, &browser.screenshot());
    }
    assert_well(&mut browser, &url);

    // It is driven by the keyboard alone, too: what is open stays open, and the focus where it was.
    browser.evaluate(
        "document.querySelector('#limits summary').focus(); document.activeElement.click(); fresh.limits = 0",
    );
    browser.until("fresh.limits > 0");
    browser.until("document.activeElement.matches('#limits details[open] summary')");
    browser.until("document.querySelector('#limits details').innerText.includes('reporting')");

    // Figures that are old are said to be, and a pgweir that is gone.
    let later =
        "Date.now = ((now) => () => now() + 60000)(Date.now); show(); document.querySelector('#state').textContent";
    assert_eq!(browser.evaluate(later), "stale");
    assert!(
        browser
            .evaluate("document.querySelector('#notice').innerText")
            .as_str()
            .unwrap()
            .contains("more than 1 min old")
    );
    browser.until("document.querySelector('#state').textContent === 'live'");
    browser.forget();
    drop(pgweir);
    browser.until("document.querySelector('#notice').innerText.includes('cannot be reached')");
    keep("gone", &browser.screenshot());
}

#[tokio::test]
async fn it_shows_how_far_behind_followers_are_and_what_goes_to_them() {
    let follower = primary().follower(ClusterOptions::default().set("cluster_name", "one")).unwrap();
    let place = Place::on(primary());
    place.psql(&format!("CREATE TABLE kept (id int); ALTER TABLE kept OWNER TO {}", place.name));
    primary().await_replay(&follower, SOON).unwrap();
    let address = follower.addr().to_string();
    let settings =
        [("databases.PLACE.followers", &*address), ("read_routing", "auto"), ("read_sample_interval", "5ms")];
    let pgweir = start_pgweir(place.toml(&settings));
    let (to, name) = (pgweir.addr(), place.name.clone());
    let busy = tokio::spawn(async move {
        let mut client = Wire::open(to, &name, &name, PASSWORD).await.unwrap();
        for turn in 0_u32.. {
            let sql = if turn % 50 == 0 { "INSERT INTO kept VALUES (1)" } else { "SELECT count(*) FROM kept" };
            if client.query(sql).await.is_err() {
                return;
            }
        }
    });
    tokio::task::spawn_blocking(move || look_at_followers(&pgweir, &address)).await.unwrap();
    busy.await.unwrap();
}

fn look_at_followers(pgweir: &Pgweir, address: &str) {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut browser = Browser::start();
    for (name, width, height, scheme) in [WINDOWS[0], WINDOWS[3]] {
        browser.resize(width, height, scheme);
        browser.open(&url(pgweir));
        browser.until("document.querySelector('#followers')?.hidden === false");
        browser.until(
            "/[1-9][0-9.]* % of [0-9,]+ transactions to followers; to the primary: .*writes/
            .test(document.querySelector('#routes').innerText)",
        );
        let row = browser.evaluate("document.querySelector('#follower-rows').innerText");
        let row = row.as_str().unwrap();
        assert!(row.contains(address) && row.contains("serves") && row.contains(" %"), "{name}: {row}");
        assert_fits(&mut browser, name);
        keep(&format!("followers-{name}"), &browser.screenshot());
    }
    assert_well(&mut browser, &url(pgweir));
}

#[tokio::test]
async fn it_says_when_there_is_nothing_to_show_and_asks_for_the_token_where_there_is_one() {
    let site = Site::start(&[]);
    let locked = Site::start(&[("http_token", TOKEN), ("http_listen", "0.0.0.0:0")]);
    let mut client = locked.client().await;
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    client.send(&query("SELECT pg_sleep(60)")).await.unwrap();
    tokio::task::spawn_blocking(move || look_without_figures(&site.pgweir, &locked.pgweir)).await.unwrap();
}

/// Looks at one that nobody has used yet, and at one that has a token.
fn look_without_figures(empty: &Pgweir, locked: &Pgweir) {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut browser = Browser::start();
    browser.resize(390, 844, "light");
    browser.open(&url(empty));
    browser.until("document.querySelector('#limits')?.innerText.includes('No client has connected yet')");
    browser.until("document.querySelector('#nobody').innerText.includes('Nobody holds one')");
    assert_still(&mut browser, "empty");
    keep("empty", &browser.screenshot());
    assert_well(&mut browser, &url(empty));

    browser.forget();
    browser.open(&url(locked));
    browser.until("document.querySelector('#login')?.hidden === false");
    assert_eq!(browser.evaluate("document.querySelector('#main').hidden"), true);
    keep("token", &browser.screenshot());
    let give = |token: &str| {
        format!(
            "document.querySelector('#token').value = '{token}'; document.querySelector('#login').requestSubmit(); true"
        )
    };
    browser.evaluate(&give("not-the-right-token"));
    browser.until("document.querySelector('#notice').innerText.includes('not the right one')");
    browser.evaluate(&give(TOKEN));
    browser.until("document.querySelector('#state').textContent === 'live' && document.querySelector('#login').hidden");
    browser.until("document.querySelectorAll('#holders tr').length === 1");
    let html = browser.evaluate("document.documentElement.outerHTML + location.href + JSON.stringify(localStorage)");
    assert!(!html.as_str().unwrap().contains(TOKEN));
    keep("unlocked", &browser.screenshot());
}
