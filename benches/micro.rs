//! Micro-benchmarks of the hot path's parts.
fn main() {}
