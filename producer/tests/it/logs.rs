//! What was logged.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, OnceLock};

use tracing::Dispatch;
use tracing::subscriber::DefaultGuard;

/// Collects what this thread logs until it is dropped.
pub(crate) struct Logs {
    text: Arc<Mutex<Vec<u8>>>,
    _guard: DefaultGuard,
}

/// To be called before anything that logs, in every test.
///
/// While there is only one subscriber, `tracing` takes that of the thread that first comes by a
/// log statement for all there are: a test that collects nothing would switch the statement off
/// for those that do. With two that stay, it asks every one.
pub(crate) fn prepare() {
    static STAYING: OnceLock<[Dispatch; 2]> = OnceLock::new();
    STAYING.get_or_init(|| {
        [(); 2].map(|()| {
            let subscriber = tracing_subscriber::fmt()
                .with_max_level(tracing::Level::TRACE)
                .with_writer(io::sink);
            Dispatch::new(subscriber.finish())
        })
    });
}

impl Logs {
    pub(crate) fn collect() -> Self {
        prepare();
        let text = Arc::new(Mutex::new(Vec::new()));
        let writer = Writer(Arc::clone(&text));
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        Self {
            text,
            _guard: tracing::subscriber::set_default(subscriber),
        }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.text.lock().unwrap().clone()).unwrap()
    }

    /// The lines that contain `part`.
    pub(crate) fn lines(&self, part: &str) -> Vec<String> {
        let text = self.text();
        let lines = text.lines().filter(|line| line.contains(part));
        lines.map(str::to_owned).collect()
    }
}

#[derive(Clone)]
struct Writer(Arc<Mutex<Vec<u8>>>);

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
