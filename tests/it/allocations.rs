//! No heap allocation per transaction: the worker runs in this process, and the program's allocator counts what its
//! thread asks for. Ticks are left out while it counts; what one may cost has its own test.
#![allow(unsafe_code, reason = "an allocator has no safe form; each use carries its proof")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pgweir::net::tls::Keyring;
use pgweir::observe::Shared;
use pgweir::worker::{self, Command, WorkerHandle};
use pgweir_config::{Config, Sources};

use crate::crowd::{Crowd, Script};
use crate::support::{Place, SOON, primary};

/// Transactions before counting: buffers, queues and stacks grow to what the load needs.
const WARM_UP: usize = 2000;

/// Transactions that are counted.
const TRANSACTIONS: usize = 2000;

/// Allocations whose origin is kept.
const ORIGINS: usize = 4;

/// What the ten ticks of a second may allocate: a snapshot for the observers, whatever the load was.
const PER_SECOND_OF_TICKS: u64 = 32;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The system's allocator, counting what one thread asks for.
struct Counting;

/// The kernel's id of the thread that is watched; 0 for none.
static WATCHED: AtomicI32 = AtomicI32::new(0);
static COUNT: AtomicU64 = AtomicU64::new(0);
static FROM: Mutex<Vec<Backtrace>> = Mutex::new(Vec::new());
/// There is one count for all.
static ONE_WATCH: Mutex<()> = Mutex::new(());

thread_local! {
    /// The kernel's id of this thread; 0 before it was asked for.
    static THREAD: Cell<i32> = const { Cell::new(0) };
    /// This thread is inside [`note`]: what that allocates is not counted.
    static NOTING: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: every method passes its arguments on to `System` unchanged and returns its answer; so the caller's promises
// are those that `System` asks for, and `System`'s are those that the caller is given. `note` does not unwind: it
// takes a poisoned lock as it is, and formats and indexes nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        note();
        // SAFETY: as above; `ptr` came from `System`, since every allocation does.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

/// Counts one allocation, if it is the watched thread's.
#[inline]
fn note() {
    let watched = WATCHED.load(Ordering::Relaxed);
    if watched != 0 && watched == thread_id() && !NOTING.get() {
        NOTING.set(true);
        COUNT.fetch_add(1, Ordering::Relaxed);
        let mut from = FROM.lock().unwrap_or_else(PoisonError::into_inner);
        if from.len() < ORIGINS {
            from.push(Backtrace::force_capture());
        }
        drop(from);
        NOTING.set(false);
    }
}

fn thread_id() -> i32 {
    if THREAD.get() == 0 {
        // SAFETY: gettid has no preconditions, touches no memory and cannot fail (gettid(2)).
        THREAD.set(unsafe { libc::gettid() });
    }
    THREAD.get()
}

/// Counts the allocations of one thread while it exists.
struct Watch {
    _only: MutexGuard<'static, ()>,
}

impl Watch {
    fn over(thread: i32) -> Self {
        let only = ONE_WATCH.lock().unwrap_or_else(PoisonError::into_inner);
        COUNT.store(0, Ordering::Relaxed);
        FROM.lock().unwrap().clear();
        WATCHED.store(thread, Ordering::SeqCst);
        Self { _only: only }
    }

    /// How many there were, and where the first of them came from.
    fn finish(self) -> (u64, String) {
        WATCHED.store(0, Ordering::SeqCst);
        let from = FROM.lock().unwrap().iter().map(origin).collect::<Vec<_>>().join("\n");
        let count = COUNT.load(Ordering::Relaxed);
        // Only now may another begin.
        drop(self);
        (count, from)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        WATCHED.store(0, Ordering::SeqCst);
    }
}

/// The frames of a backtrace that are our own code, or all of them if none is.
fn origin(backtrace: &Backtrace) -> String {
    let text = backtrace.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let ours = lines.windows(2).filter(|pair| {
        let [name, place] = pair else { return false };
        let ours = ["at ./src/", "at ./proto/", "at ./config/"].iter().any(|folder| place.starts_with(folder));
        ours && !name.starts_with("at ")
    });
    let ours: Vec<String> = ours.map(|pair| pair.join(" ")).collect();
    if ours.is_empty() { text } else { format!("allocation:\n  {}", ours.join("\n  ")) }
}

/// pgweir's worker, on a thread of this process, before a place of its own.
struct Worker<'a> {
    place: Place<'a>,
    addr: SocketAddr,
    handle: WorkerHandle,
    thread: i32,
}

impl Worker<'static> {
    fn start(settings: &[(&str, &str)]) -> Self {
        Self::before(Place::on(primary()), settings)
    }
}

impl<'a> Worker<'a> {
    fn before(place: Place<'a>, settings: &[(&str, &str)]) -> Self {
        // Whoever starts a worker meanwhile would be taken for ours.
        static ONE_START: Mutex<()> = Mutex::new(());
        let toml = place.toml(settings);
        let sources = Sources { file: Some(("pgweir.toml", &toml)), env: &[], args: &[] };
        let config = Arc::new(Config::from_sources(sources).unwrap());
        let listeners = pgweir::net::listen(&config.listen).unwrap();
        let addr = listeners[0].address().unwrap().parse().unwrap();
        let shared = Arc::new(Shared::new(Instant::now()));
        let keyring = Arc::new(Keyring::load(Arc::clone(&config)).unwrap());
        let started = ONE_START.lock().unwrap_or_else(PoisonError::into_inner);
        let before = worker_threads();
        // It tries a runtime out, which must not happen inside of another: the test's.
        let start = thread::spawn(move || {
            worker::start(config, Arc::default(), listeners, keyring, shared, &mut Vec::new()).unwrap()
        });
        let handle = start.join().unwrap();
        let begun = Instant::now();
        let thread = loop {
            // A thread names itself when it runs.
            if let Some(thread) = worker_threads().difference(&before).next() {
                break *thread;
            }
            assert!(begun.elapsed() < SOON, "no thread worker-0");
            thread::sleep(Duration::from_millis(1));
        };
        drop(started);
        Self { place, addr, handle, thread }
    }

    async fn crowd(&self, clients: usize, script: &Script) -> Crowd {
        Crowd::gather(self.addr, &self.place.name, clients, script).await
    }

    fn tick(&self) {
        self.handle.commands.send(Command::Tick).unwrap();
    }

    async fn stop(self) {
        let Self { handle: WorkerHandle { commands, finished, thread, .. }, .. } = self;
        commands.send(Command::Stop).unwrap();
        let ticker = thread::spawn(move || {
            while commands.send(Command::Tick).is_ok() {
                thread::sleep(Duration::from_millis(10));
            }
        });
        finished.await.unwrap();
        ticker.join().unwrap();
        thread.join().unwrap();
    }
}

/// The threads of this process that are named as the worker's is.
fn worker_threads() -> BTreeSet<i32> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let named = tasks.filter(|task| {
        // It may have ended meanwhile.
        fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim_end() == "worker-0")
    });
    named.map(|task| task.file_name().to_str().unwrap().parse().unwrap()).collect()
}

/// Asserts that `clients` over a pool of `pool_size` run `script` without an allocation on the worker's thread, in one
/// of so many rounds.
async fn assert_none(clients: usize, pool_size: usize, rounds: u32, script: Script) {
    let worker = Worker::start(&[("default_pool_size", &pool_size.to_string())]);
    let mut crowd = worker.crowd(clients, &script).await;
    let mut script = crowd.run(script, WARM_UP).await;
    // A login to the server that is under way when counting begins would be counted.
    let begun = Instant::now();
    while worker.place.servers() as usize != pool_size.min(clients) {
        assert!(begun.elapsed() < SOON, "{} server connections", worker.place.servers());
        script = crowd.run(script, WARM_UP).await;
    }
    script = crowd.run(script, WARM_UP).await;
    assert_none_of(worker, crowd, rounds, script).await;
}

/// The same of clients that have warmed up.
async fn assert_none_of(worker: Worker<'_>, mut crowd: Crowd, rounds: u32, mut script: Script) {
    let mut counts = Vec::new();
    let mut origins = String::new();
    while counts.len() < rounds as usize && !counts.contains(&0) {
        let watch = Watch::over(worker.thread);
        script = crowd.run(script, TRANSACTIONS).await;
        let (count, from) = watch.finish();
        counts.push(count);
        origins.push_str(&from);
    }
    worker.stop().await;
    assert!(counts.contains(&0), "{counts:?} allocations in {TRANSACTIONS} transactions, the first:\n{origins}");
}

/// One client: nothing may be allocated.
async fn assert_none_alone(script: Script) {
    assert_none(1, 4, 1, script).await;
}

/// Sixteen clients of whom twelve wait. A session's working part gets its buffer when it waits for the first time, and
/// which one is lent to whom is luck: there are as many as clients, so such a round is followed by one without.
async fn assert_none_waiting(script: Script) {
    assert_none(16, 4, 3, script).await;
}

#[tokio::test]
async fn simple_queries_allocate_nothing() {
    assert_none_alone(Script::simple()).await;
}

#[tokio::test]
async fn transactions_of_three_round_trips_allocate_nothing() {
    assert_none_alone(Script::transaction()).await;
}

#[tokio::test]
async fn extended_queries_of_the_same_text_allocate_nothing() {
    assert_none_alone(Script::extended()).await;
}

#[tokio::test]
async fn prepared_queries_allocate_nothing() {
    assert_none_alone(Script::prepared()).await;
}

#[tokio::test]
async fn simple_queries_that_wait_for_a_server_connection_allocate_nothing() {
    assert_none_waiting(Script::simple()).await;
}

#[tokio::test]
async fn transactions_that_wait_for_a_server_connection_allocate_nothing() {
    assert_none_waiting(Script::transaction()).await;
}

#[tokio::test]
async fn prepared_queries_that_wait_for_a_server_connection_allocate_nothing() {
    assert_none_waiting(Script::prepared()).await;
}

/// Literals that were never seen before, of a text that was: what it may do is known, and so is where it may run. Now and then
/// a follower is asked how far it is, which is not counted: one round without is enough.
#[cfg(feature = "grammar")]
#[test]
fn reads_on_followers_allocate_nothing() {
    use crate::crowd::ACCOUNTS;
    use crate::routing::family;
    use crate::stage::run;

    let family = family();
    let place = family.place();
    place.psql(&format!("ALTER ROLE {0} SET log_statement = 'none'; SET ROLE {0}; {ACCOUNTS}", place.name));
    let followers = family.list();
    let settings = [
        ("databases.PLACE.followers", followers.as_str()),
        ("read_routing", "auto"),
        ("read_freshness", "eventual"),
        ("read_sample_interval", "10s"),
        ("default_pool_size", "4"),
    ];
    run(Duration::from_mins(1), async {
        let worker = Worker::before(place, &settings);
        let mut script = Script::reads();
        let mut crowd = worker.crowd(1, &script).await;
        let begun = Instant::now();
        while family.serving(&worker.place) == 0 {
            assert!(begun.elapsed() < SOON, "no follower serves");
            script = crowd.run(script, 100).await;
        }
        for _ in 0..3 {
            script = crowd.run(script, WARM_UP).await;
        }
        assert_none_of(worker, crowd, 8, script).await;
    });
}

#[tokio::test]
async fn ticks_allocate_little_whatever_the_number_of_clients() {
    let worker = Worker::start(&[("default_pool_size", "4")]);
    let mut crowd = worker.crowd(1, &Script::simple()).await;
    let mut script = Script::simple();
    let mut counts = Vec::new();
    for more in [0, 63] {
        let idle = worker.crowd(more, &script).await;
        script = crowd.run(script, 100).await;
        let watch = Watch::over(worker.thread);
        (0..10).for_each(|_| worker.tick());
        // Between so many transactions the worker has looked at what it was told.
        script = crowd.run(script, 100).await;
        let (count, from) = watch.finish();
        assert!(count <= PER_SECOND_OF_TICKS, "{count} allocations with {more} more clients, the first:\n{from}");
        counts.push(count);
        drop(idle);
    }
    assert!(counts[0] > 0, "a snapshot was published");
    assert_eq!(counts[0], counts[1], "a tick's cost does not depend on the number of clients");
    worker.stop().await;
}

#[test]
fn an_allocation_of_the_watched_thread_is_counted_and_told_from_others() {
    let watch = Watch::over(thread_id());
    let one = std::hint::black_box(Box::new(7_u64));
    // Another thread's are not; starting it costs this thread some.
    let before = COUNT.load(Ordering::Relaxed);
    let other = thread::spawn(|| (0..1000).map(|n| std::hint::black_box(Box::new(n))).map(|n| *n).sum::<u64>());
    let sum = other.join().unwrap();
    let (count, from) = watch.finish();
    drop(one);
    assert!(before >= 1 && count < 1000, "{before}, {count}, {sum}");
    assert!(from.contains("an_allocation_of_the_watched_thread"), "{from}");
}
