//! Waiting for a condition, up to a deadline.

use std::panic::Location;
use std::thread;
use std::time::{Duration, Instant};

/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(2);

/// Looks at `condition` every 2 ms until it holds.
///
/// # Panics
///
/// When it does not hold `within` that time; the panic names the caller's line.
#[track_caller]
pub fn wait_until(within: Duration, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < within, "the condition did not come true within {within:?}");
        thread::sleep(PAUSE);
    }
}

/// [`wait_until`] for a condition that awaits.
///
/// # Panics
///
/// When it does not hold `within` that time; the panic names the caller's line.
#[track_caller]
pub fn wait_until_async(within: Duration, mut condition: impl AsyncFnMut() -> bool) -> impl Future<Output = ()> {
    let caller = Location::caller();
    async move {
        let waiting = async {
            while !condition().await {
                tokio::time::sleep(PAUSE).await;
            }
        };
        let came = tokio::time::timeout(within, waiting).await.is_ok();
        assert!(came, "{caller}: the condition did not come true within {within:?}");
    }
}
