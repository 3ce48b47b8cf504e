//! `producer config`: the options in force, and where each comes from.

use clap::Args;
use common::cli::{Origin, Setting};
use common::exit;
use url::Url;

use crate::feed::fetch::shown;
use crate::run::RunConfig;
use crate::terminal::print;

/// Variables that are no options: credentials, and what libraries or traces read.
const VARIABLES: [&str; 33] = [
    "GITHUB_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "R2_BUCKET",
    "R2_ENDPOINT",
    "R2_ACCESS_KEY",
    "R2_SECRET_KEY",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "OTEL_SDK_DISABLED",
    "OTEL_TRACES_EXPORTER",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_TIMEOUT",
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_SERVICE_NAME",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
];

/// Prints the options that `run` would have.
#[derive(Args, Debug)]
pub struct SettingsCommand {
    // Not read: what matters is where they come from.
    #[command(flatten)]
    _run: Box<RunConfig>,
}

impl SettingsCommand {
    /// Prints `settings` as a file for `--config`.
    pub fn run(&self, settings: &[Setting]) -> u8 {
        let is_set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let variables: Vec<_> = VARIABLES.into_iter().filter(is_set).collect();
        // Its reader may have left.
        print(&page(settings, &variables)).ok();
        exit::OK
    }
}

fn page(settings: &[Setting], variables: &[&str]) -> String {
    let mut settings: Vec<_> = settings.iter().filter(|s| s.name != "config").collect();
    settings.sort_by(|a, b| a.name.cmp(&b.name));
    let lines: Vec<_> = settings.into_iter().map(line).collect();
    let width = lines.iter().map(|(line, _)| line.chars().count()).max();
    let width = width.unwrap_or_default().min(60);
    // What is only the producer's would be refused by a worker that reads the same file.
    let mut page = "[producer]\n".to_owned();
    for (line, origin) in lines {
        page += &format!("{line:width$}  # {origin}\n");
    }
    if !variables.is_empty() {
        page += &format!(
            "# Also in the environment, and not shown: {}\n",
            variables.join(", ")
        );
    }
    page
}

/// Returns an option as a line of TOML, and where it comes from. What is not set, or secret, is a
/// comment.
fn line(setting: &Setting) -> (String, String) {
    let name = &setting.name;
    let origin = match &setting.origin {
        Origin::Flag => format!("--{name}"),
        Origin::Variable(variable) => format!("variable {variable}"),
        Origin::File(path) => path.display().to_string(),
        Origin::Default => "default".to_owned(),
    };
    let hides = |values: &Vec<String>| values.iter().any(|value| shortened(value).is_some());
    let line = match &setting.values {
        Some(values) if hides(values) => {
            let shown = values
                .iter()
                .map(|v| shortened(v).unwrap_or_else(|| v.clone()));
            let shown: Vec<_> = shown.map(|value| quoted(&value)).collect();
            format!("# {name} = {}, not shown in full", shown.join(", "))
        }
        None if setting.origin == Origin::Default => format!("# {name} is not set"),
        None => format!("# {name} is secret"),
        Some(values) if values.is_empty() => format!("# {name} is not set"),
        Some(values) if setting.is_list => {
            let values: Vec<_> = values.iter().map(|value| quoted(value)).collect();
            format!("{name} = [{}]", values.join(", "))
        }
        Some(values) if matches!(values[0].as_str(), "true" | "false") => {
            format!("{name} = {}", values[0])
        }
        Some(values) => format!("{name} = {}", quoted(&values[0])),
    };
    (line, origin)
}

/// Returns a URL without credentials and query, if it has either.
fn shortened(value: &str) -> Option<String> {
    let shortened = shown(&Url::parse(value).ok()?);
    let is_longer = value.contains('@') || value.contains('?');
    is_longer.then_some(shortened)
}

/// Quotes a text for TOML. Its basic strings are those of JSON, except that DEL is escaped.
fn quoted(text: &str) -> String {
    let quoted = serde_json::Value::from(text).to_string();
    quoted.replace('\u{7f}', "\\u007f")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_option_is_shown_with_its_origin() {
        let setting = |name: &str, values: Option<&[&str]>, is_list, origin| Setting {
            name: name.to_owned(),
            values: values.map(|values| values.iter().map(|v| (*v).to_owned()).collect()),
            is_list,
            origin,
        };
        let settings = [
            setting("store", Some(&["a \"b\""]), false, Origin::Flag),
            setting(
                "broker-url",
                None,
                false,
                Origin::Variable("BROKER_URL".to_owned()),
            ),
            setting(
                "only",
                Some(&["a/*", "b"]),
                true,
                Origin::File("fleet.toml".into()),
            ),
            setting("limit", Some(&[]), false, Origin::Default),
            setting("force", Some(&["true"]), false, Origin::Flag),
            setting(
                "feed",
                Some(&["https://u:p@h/x?token=t"]),
                false,
                Origin::Flag,
            ),
        ];
        let expected = "\
[producer]
# broker-url is secret                       # variable BROKER_URL
# feed = \"https://h/x?…\", not shown in full  # --feed
force = true                                 # --force
# limit is not set                           # default
only = [\"a/*\", \"b\"]                          # fleet.toml
store = \"a \\\"b\\\"\"                            # --store
# Also in the environment, and not shown: GITHUB_TOKEN
";
        assert_eq!(page(&settings, &["GITHUB_TOKEN"]), expected);
    }
}
