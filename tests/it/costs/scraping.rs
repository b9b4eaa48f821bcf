//! What it costs to be watched: `/metrics` and `/limits` asked for once a second, under load.

use std::fs;
use std::time::{Duration, Instant};

use pgweir_harness::Pgweir;

use super::{ALONE, start};
use crate::crowd::{Crowd, Script};
use crate::fleet::cost::cpu;
use crate::support::{Place, primary};

/// Its share of pgweir's CPU time, at most.
const SHARE_BAR: f64 = 0.01;

/// For so long.
const SECONDS: u32 = 5;

/// CPU time of the worker, which relays, and of all other threads, which do nothing else than watch and be asked.
fn worker_and_others(pgweir: &Pgweir) -> (Duration, Duration) {
    let (mut worker, mut others) = Default::default();
    for task in fs::read_dir(format!("/proc/{}/task", pgweir.pid())).unwrap() {
        let task = task.unwrap().path();
        let of: &mut Duration = if fs::read_to_string(task.join("comm")).unwrap().starts_with("worker-") {
            &mut worker
        } else {
            &mut others
        };
        *of += cpu(task.join("schedstat"));
    }
    (worker, others)
}

#[tokio::test]
async fn being_asked_every_second_costs_less_than_a_hundredth_of_what_the_load_does() {
    let _alone = ALONE.lock().await;
    let place = Place::on(primary());
    let pgweir = start(&place, &[("default_pool_size", "10")]);
    let mut script = Script::simple();
    let mut crowd = Crowd::gather(pgweir.addr(), &place.name, 16, &script).await;
    script = crowd.run(script, 2000).await;
    let before = worker_and_others(&pgweir);
    for _ in 0..SECONDS {
        for path in ["/metrics", "/limits"] {
            let (status, body) = pgweir.http_get(path).unwrap();
            assert_eq!(status, 200, "{path}: {body}");
        }
        let asked = Instant::now();
        while asked.elapsed() < Duration::from_secs(1) {
            script = crowd.run(script, 500).await;
        }
    }
    let after = worker_and_others(&pgweir);
    let (worker, others) = (after.0.saturating_sub(before.0), after.1.saturating_sub(before.1));
    let share = others.as_secs_f64() / (worker + others).as_secs_f64();
    eprintln!("of {:?} of CPU time in {SECONDS} s, {:.2} % went into being watched", worker + others, share * 100.0);
    assert!(share < SHARE_BAR, "{others:?} beside {worker:?}");
}
