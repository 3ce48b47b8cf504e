//! Log lines, as JSON or for people.

use std::fmt;
use std::io::IsTerminal;

use anyhow::anyhow;
use clap::{Args, ColorChoice, ValueEnum};
use serde::Serialize;
use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::macros::format_description;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::exit::{self, ExitError};
use crate::text::printable;

/// How to log.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Logs and metrics")]
pub struct LogConfig {
    /// Log format: one JSON object per line, lines for people, or the latter only on a terminal
    #[arg(
        long,
        global = true,
        env = "LOG_FORMAT",
        value_name = "FORM",
        default_value = "auto"
    )]
    pub log: LogFormat,
    /// What to log: a level, or directives such as `info,worker=debug`
    #[arg(
        long,
        global = true,
        env = "LOG_LEVEL",
        value_name = "LEVEL",
        default_value = "info"
    )]
    pub log_level: String,
    /// Whether to color lines for people: auto does on a terminal, unless NO_COLOR is set
    #[arg(
        long,
        global = true,
        env = "COLOR",
        value_name = "WHEN",
        default_value = "auto"
    )]
    pub color: ColorChoice,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// Lines for people.
    Human,
    /// `human` on a terminal, else `json`.
    Auto,
}

impl LogConfig {
    /// Returns whether lines are for people.
    pub fn is_human(&self) -> bool {
        match self.log {
            LogFormat::Json => false,
            LogFormat::Human => true,
            LogFormat::Auto => std::io::stdout().is_terminal(),
        }
    }

    /// Sends every log line of this process to `writer` from now on, those for people `colored` or not.
    ///
    /// # Errors
    /// If `log_level` is invalid, or logging is already set up.
    pub fn init<W>(&self, writer: W, colored: bool) -> anyhow::Result<()>
    where
        W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
    {
        let invalid = |why: &dyn fmt::Display| {
            let message = format!(
                "--log-level {:?}: {why}; give error, warn, info, debug or trace, or directives such as info,worker=debug",
                self.log_level
            );
            ExitError::new(exit::USAGE, message)
        };
        // EnvFilter takes a single unknown word for a target, and would log nothing else.
        if !self.log_level.contains(['=', ',', '[']) {
            self.log_level
                .parse::<LevelFilter>()
                .map_err(|_| invalid(&"no such level"))?;
        }
        // lapin logs expected answers (does the queue exist? is the lock free?) as errors, and the
        // password at trace. A directive can still turn it on.
        let filter = EnvFilter::try_new(format!("lapin=off,{}", self.log_level))
            .map_err(|error| invalid(&error))?;
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .fmt_fields(SpanFields)
            .event_format(self.line_format(colored))
            .with_writer(writer)
            .try_init()
            .map_err(|error| anyhow!("logging is already set up: {error}"))
    }

    /// Returns whether what is for people is colored, where it goes to `stream`.
    pub fn is_colored(&self, stream: &impl IsTerminal) -> bool {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        match self.color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            // https://no-color.org
            ColorChoice::Auto => stream.is_terminal() && !is_set("NO_COLOR"),
        }
    }

    fn line_format(&self, colored: bool) -> LineFormat {
        match self.is_human() {
            true => LineFormat::Human { colored },
            false => LineFormat::Json,
        }
    }
}

/// Formats an event as one line: for people, or as
/// `{"timestamp","level","message","context":{"operation","metadata"}}`.
///
/// The field `operation` becomes the context's operation (default: the event's target). Every other
/// field, and every field of the spans around it, becomes a member of the metadata. A text field
/// whose name ends with `_json` is embedded as JSON, under the name without that suffix.
#[derive(Clone, Copy)]
enum LineFormat {
    Json,
    Human { colored: bool },
}

impl<S> FormatEvent<S, SpanFields> for LineFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, SpanFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let now = OffsetDateTime::now_utc();
        let level = *event.metadata().level();
        let mut fields = Fields::default();
        match self {
            Self::Human { colored } => {
                event.record(&mut fields);
                let time = now
                    .format(format_description!("[hour]:[minute]:[second]"))
                    .map_err(|_| fmt::Error)?;
                // Most lines are information, and need no label.
                let level = match (level, colored) {
                    (Level::INFO, _) => String::new(),
                    (Level::ERROR, true) => format!("{} ", red(level)),
                    (Level::WARN, true) => format!("{} ", yellow(level)),
                    (level, _) => format!("{level} "),
                };
                writeln!(writer, "{time} {level}{}", printable(&fields.message))
            }
            Self::Json => {
                let scope = context.event_scope().map(|scope| scope.from_root());
                for span in scope.into_iter().flatten() {
                    if let Some(outer) = span.extensions().get::<FormattedFields<SpanFields>>() {
                        fields.metadata.extend(outer_fields(outer));
                    }
                }
                event.record(&mut fields);
                let timestamp = now
                    .format(format_description!(
                        "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z"
                    ))
                    .map_err(|_| fmt::Error)?;
                let line = Line {
                    timestamp,
                    level: level.as_str().to_ascii_lowercase(),
                    message: &fields.message,
                    context: Context {
                        operation: fields
                            .operation
                            .as_deref()
                            .unwrap_or(event.metadata().target()),
                        metadata: &fields.metadata,
                    },
                };
                let line = serde_json::to_string(&line).map_err(|_| fmt::Error)?;
                writeln!(writer, "{line}")
            }
        }
    }
}

/// Colors a text red, for what failed.
pub fn red(text: impl fmt::Display) -> String {
    format!("\u{1b}[31m{text}\u{1b}[0m")
}

/// Colors a text yellow, for what may be wrong.
pub fn yellow(text: impl fmt::Display) -> String {
    format!("\u{1b}[33m{text}\u{1b}[0m")
}

/// Keeps a span's fields as JSON objects, one for each time that fields were recorded.
struct SpanFields;

impl<'a> FormatFields<'a> for SpanFields {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'a>, span: R) -> fmt::Result {
        let mut fields = Fields::default();
        span.record(&mut fields);
        write!(writer, "{}", Value::Object(fields.metadata))
    }
}

fn outer_fields(objects: &str) -> impl Iterator<Item = (String, Value)> {
    serde_json::Deserializer::from_str(objects)
        .into_iter::<Map<String, Value>>()
        .flatten()
        .flatten()
}

/// A JSON line, its members in the prescribed order.
#[derive(Serialize)]
struct Line<'a> {
    timestamp: String,
    level: String,
    message: &'a str,
    context: Context<'a>,
}

#[derive(Serialize)]
struct Context<'a> {
    operation: &'a str,
    metadata: &'a Map<String, Value>,
}

#[derive(Default)]
struct Fields {
    message: String,
    operation: Option<String>,
    metadata: Map<String, Value>,
}

impl Fields {
    fn insert(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            ("operation", Value::String(text)) => self.operation = Some(text),
            (name, value) => {
                let (name, value) = match (name.strip_suffix("_json"), &value) {
                    (Some(stem), Value::String(text)) => {
                        (stem, serde_json::from_str(text).unwrap_or(value))
                    }
                    _ => (name, value),
                };
                self.metadata.insert(name.to_owned(), value);
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.insert(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.insert(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.insert(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.insert(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.insert(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.insert(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn lines_of(format: LineFormat, log: impl FnOnce()) -> String {
        let captured = Captured::default();
        let writer = captured.clone();
        let subscriber = tracing_subscriber::fmt()
            .fmt_fields(SpanFields)
            .event_format(format)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = captured.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_json_line_has_the_prescribed_shape() {
        let line = lines_of(LineFormat::Json, || {
            let classes = r#"{"gone":2}"#;
            tracing::warn!(
                operation = "x",
                repo = "a/b",
                n = 3,
                by_class_json = classes,
                "hi \"you\"\n"
            );
        });
        assert_eq!(line.matches('\n').count(), 1, "one line: {line:?}");
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["level"], "warn");
        assert_eq!(value["message"], "hi \"you\"\n");
        assert_eq!(value["context"]["operation"], "x");
        assert_eq!(
            value["context"]["metadata"],
            serde_json::json!({"repo": "a/b", "n": 3, "by_class": {"gone": 2}})
        );
        let timestamp = value["timestamp"].as_str().unwrap();
        assert!(
            timestamp.len() == "2026-11-23T12:47:15.504540Z".len(),
            "{timestamp}"
        );
        assert!(timestamp.ends_with('Z'), "{timestamp}");
    }

    const PLAIN: LineFormat = LineFormat::Human { colored: false };

    #[test]
    fn a_line_for_people_may_have_a_colored_level() {
        let colored = LineFormat::Human { colored: true };
        let line = lines_of(colored, || tracing::warn!("so so"));
        assert!(line.ends_with(" \u{1b}[33mWARN\u{1b}[0m so so\n"), "{line}");
        let line = lines_of(colored, || tracing::info!("well"));
        assert!(
            line.ends_with(" well\n") && !line.contains('\u{1b}'),
            "{line}"
        );
    }

    #[test]
    fn a_line_for_people_is_time_and_message() {
        let line = lines_of(PLAIN, || {
            tracing::info!(repo = "a/b", "stored a/b");
        });
        assert_eq!(line.split_once(' ').unwrap().1, "stored a/b\n");
        let line = lines_of(PLAIN, || tracing::error!("no"));
        assert!(line.ends_with(" ERROR no\n"), "{line}");
        let line = lines_of(PLAIN, || tracing::info!("ä\u{1b}[2J\nb"));
        assert!(line.ends_with(" ä\\u{1b}[2J\\nb\n"), "{line}");
    }

    #[test]
    fn a_json_line_has_the_fields_of_the_spans_around_it() {
        let line = lines_of(LineFormat::Json, || {
            let run = tracing::error_span!("run", run_id = "r", attempt = 0).entered();
            let job = tracing::error_span!(
                "job",
                repo = "a/b",
                attempt = 1,
                host = tracing::field::Empty
            )
            .entered();
            job.record("host", "h");
            tracing::info!(repo = "c/d", "hi");
            drop((job, run));
        });
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            value["context"]["metadata"],
            serde_json::json!({"run_id": "r", "attempt": 1, "host": "h", "repo": "c/d"})
        );
    }
}
