//! What the metrics of both programs have in common. Each program's own are with that program.

use std::sync::LazyLock;

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{IntGaugeVec, Opts, Registry, TextEncoder};

/// Metrics that can be served at `/metrics`.
pub trait Expose: Clone + Send + Sync + 'static {
    /// Renders all of them in Prometheus' text format.
    fn render(&self) -> Vec<u8>;
}

/// Memory, CPU time and files of this process, under the names that all programs use.
static PROCESS: LazyLock<Registry> = LazyLock::new(|| {
    let registry = Registry::new();
    registry
        .register(Box::new(ProcessCollector::for_self()))
        .expect("the registry is empty");
    registry
});

/// Returns a registry of metrics named `repofleet_…`, with `build_info` in it.
pub fn new_registry() -> Registry {
    let registry = Registry::new_custom(Some("repofleet".to_owned()), None)
        .expect("the prefix is a valid name");
    let opts = Opts::new("build_info", "1, with the program's version");
    let build = register(&registry, IntGaugeVec::new(opts, &["version"]));
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    registry
}

/// Registers a new metric.
pub fn register<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: prometheus::Result<C>,
) -> C {
    let collector = collector.expect("names and labels are valid");
    registry
        .register(Box::new(collector.clone()))
        .expect("names are distinct");
    collector
}

/// Renders `registry` and the metrics of this process in Prometheus' text format.
pub fn render(registry: &Registry) -> Vec<u8> {
    let mut text = String::new();
    for registry in [registry, &PROCESS] {
        TextEncoder::new()
            .encode_utf8(&registry.gather(), &mut text)
            .expect("writing to memory does not fail");
    }
    text.into_bytes()
}
