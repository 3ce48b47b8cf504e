//! The variables that OpenTelemetry's specification names, as far as they concern traces over HTTP.

use percent_encoding::percent_decode_str;
use std::time::Duration;
use url::Url;

use crate::text::unsubstituted;

/// The collector's place if only `OTEL_TRACES_EXPORTER` is given.
const ENDPOINT: &str = "http://localhost:4318";
/// How long a collector may take to answer.
const TIMEOUT: u64 = 10_000;

/// Where spans go to, and which.
pub(super) struct Settings {
    pub(super) endpoint: Url,
    /// Sent with each request. Secret.
    pub(super) headers: Vec<(String, String)>,
    /// The variable that they are from.
    pub(super) headers_from: String,
    pub(super) timeout: Duration,
    /// What the specification calls a resource: what is known of this process.
    pub(super) resource: Vec<(String, String)>,
    pub(super) sampler: Sampler,
}

/// Which traces are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sampler {
    /// This part of them …
    ratio: f64,
    /// … unless it was decided where the trace began.
    heeds_parent: bool,
}

impl Sampler {
    /// Decides about a span. All processes decide the same of a trace without a `parent`.
    pub(super) fn keeps(self, trace_id: u128, parent: Option<bool>) -> bool {
        match parent {
            Some(kept) if self.heeds_parent => kept,
            // Of 63 bits, as OpenTelemetry's own libraries do.
            _ => (trace_id as u64 >> 1) < (self.ratio * (1_u64 << 63) as f64) as u64,
        }
    }
}

impl Settings {
    /// Reads the variables of `program`; `None` if traces are off. What is wrong with a variable
    /// that the specification has ignored then is added to `warnings`.
    ///
    /// # Errors
    /// With the name of a variable without whose value nothing can be sent. No error repeats a value.
    pub(super) fn read(
        program: &str,
        variable: impl Fn(&str) -> Option<String>,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Self>, String> {
        let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        if !is_on(&variable, warnings) {
            return Ok(None);
        }
        if let Some((name, protocol)) = of_traces(&variable, "PROTOCOL")
            && protocol != "http/protobuf"
        {
            warnings.push(format!(
                "{name}={protocol} is not supported: spans are sent as http/protobuf, which a collector \
                 takes on port 4318"
            ));
        }
        let (headers_from, headers) = headers(&variable)?;
        Ok(Some(Self {
            endpoint: endpoint(&variable)?,
            headers,
            headers_from,
            timeout: timeout(&variable, warnings),
            resource: resource(program, &variable, warnings),
            sampler: sampler(&variable, warnings),
        }))
    }
}

/// Traces are off unless something says where to send them.
fn is_on(variable: &impl Fn(&str) -> Option<String>, warnings: &mut Vec<String>) -> bool {
    let disabled = variable("OTEL_SDK_DISABLED");
    if disabled.is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return false;
    }
    let has_endpoint = of_traces(variable, "ENDPOINT").is_some();
    let Some(exporters) = variable("OTEL_TRACES_EXPORTER") else {
        return has_endpoint;
    };
    match exporters.trim() {
        "none" => false,
        "otlp" => true,
        other => {
            warnings.push(format!(
                "OTEL_TRACES_EXPORTER={other} is not supported: give otlp or none"
            ));
            has_endpoint
        }
    }
}

/// Returns the variable of the exporter for traces, or else the one for all signals.
fn of_traces(variable: &impl Fn(&str) -> Option<String>, what: &str) -> Option<(String, String)> {
    let mut names = ["_TRACES", ""]
        .map(|signal| format!("OTEL_EXPORTER_OTLP{signal}_{what}"))
        .into_iter();
    names.find_map(|name| variable(&name).map(|value| (name, value.trim().to_owned())))
}

fn endpoint(variable: &impl Fn(&str) -> Option<String>) -> Result<Url, String> {
    let (name, text) = of_traces(variable, "ENDPOINT").unwrap_or_else(|| {
        let name = "OTEL_EXPORTER_OTLP_ENDPOINT";
        (name.to_owned(), ENDPOINT.to_owned())
    });
    if let Some(why) = unsubstituted(&name, &text) {
        return Err(why);
    }
    let url = Url::parse(&text).ok();
    let url = url.filter(|url| ["http", "https"].contains(&url.scheme()) && url.has_host());
    let mut url =
        url.ok_or_else(|| format!("{name} is not an http or https URL, such as {ENDPOINT}"))?;
    // One for all signals names the collector, the other one the resource.
    if !name.contains("TRACES") {
        let path = format!("{}/v1/traces", url.path().trim_end_matches('/'));
        url.set_path(&path);
    }
    Ok(url)
}

/// Returns the variable's name, and the headers in it.
fn headers(
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<(String, Vec<(String, String)>), String> {
    let (name, text) = of_traces(variable, "HEADERS").unwrap_or_default();
    if let Some(why) = unsubstituted(&name, &text) {
        return Err(why);
    }
    match pairs(&text) {
        Some(headers) => Ok((name, headers)),
        None => Err(format!("{name} is not NAME=VALUE, with commas between")),
    }
}

/// Parses `NAME=VALUE,…`, as W3C's baggage has it.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let pairs = text
        .split(',')
        .map(str::trim)
        .filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=')?;
            let decoded = |text: &str| {
                let text = percent_decode_str(text.trim()).decode_utf8().ok()?;
                let is_odd = |c: char| c.is_control() || c == char::REPLACEMENT_CHARACTER;
                (!text.contains(is_odd)).then(|| text.into_owned())
            };
            let name = decoded(name).filter(|name| !name.is_empty())?;
            Some((name, decoded(value)?))
        })
        .collect()
}

fn timeout(variable: &impl Fn(&str) -> Option<String>, warnings: &mut Vec<String>) -> Duration {
    let millis = of_traces(variable, "TIMEOUT").map(|(name, value)| {
        let millis = value.parse().ok().filter(|millis| *millis > 0);
        millis.unwrap_or_else(|| {
            warnings.push(format!(
                "{name}={value} is no number of milliseconds: using {TIMEOUT}"
            ));
            TIMEOUT
        })
    });
    Duration::from_millis(millis.unwrap_or(TIMEOUT))
}

fn resource(
    program: &str,
    variable: &impl Fn(&str) -> Option<String>,
    warnings: &mut Vec<String>,
) -> Vec<(String, String)> {
    const NAME: &str = "OTEL_RESOURCE_ATTRIBUTES";
    let given = variable(NAME).unwrap_or_default();
    let given = pairs(&given).unwrap_or_else(|| {
        warnings.push(format!(
            "{NAME} is not NAME=VALUE, with commas between, so none is used"
        ));
        Vec::new()
    });
    let system = rustix::system::uname();
    let host = system.nodename().to_string_lossy().into_owned();
    let own = [
        ("service.name", program.to_owned()),
        ("service.version", env!("CARGO_PKG_VERSION").to_owned()),
        (
            "service.instance.id",
            format!("{host}-{}", std::process::id()),
        ),
        ("host.name", host),
    ];
    let named = variable("OTEL_SERVICE_NAME").map(|name| ("service.name".to_owned(), name));
    let mut resource: Vec<(String, String)> = Vec::new();
    // The first one holds.
    let own = own.map(|(key, value)| (key.to_owned(), value));
    for (key, value) in named.into_iter().chain(given).chain(own) {
        if !resource.iter().any(|(known, _)| *known == key) {
            resource.push((key, value));
        }
    }
    resource
}

fn sampler(variable: &impl Fn(&str) -> Option<String>, warnings: &mut Vec<String>) -> Sampler {
    const NAME: &str = "OTEL_TRACES_SAMPLER";
    let all = Sampler {
        ratio: 1.0,
        heeds_parent: true,
    };
    let Some(name) = variable(NAME) else {
        return all;
    };
    let (kind, heeds_parent) = match name.trim().strip_prefix("parentbased_") {
        Some(kind) => (kind, true),
        None => (name.trim(), false),
    };
    let ratio = match kind {
        "always_on" => 1.0,
        "always_off" => 0.0,
        "traceidratio" => variable(&format!("{NAME}_ARG")).map_or(1.0, |text| {
            let ratio = text.trim().parse().ok();
            ratio
                .filter(|ratio| (0.0..=1.0).contains(ratio))
                .unwrap_or_else(|| {
                    warnings.push(format!(
                        "{NAME}_ARG={text} is no number from 0 to 1: using 1"
                    ));
                    1.0
                })
        }),
        _ => {
            warnings.push(format!(
                "{NAME}={name} is not known: using parentbased_always_on"
            ));
            return all;
        }
    };
    Sampler {
        ratio,
        heeds_parent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> (Result<Option<Settings>, String>, Vec<String>) {
        let mut warnings = Vec::new();
        let variable = |name: &str| {
            let (_, value) = variables.iter().find(|(known, _)| *known == name)?;
            Some((*value).to_owned())
        };
        let settings = Settings::read("a-program", variable, &mut warnings);
        (settings, warnings)
    }

    fn on(variables: &[(&str, &str)]) -> Settings {
        let on = [("OTEL_TRACES_EXPORTER", "otlp")];
        let (settings, warnings) = read(&[&on, variables].concat());
        assert_eq!(warnings, [""; 0]);
        settings.unwrap().unwrap()
    }

    #[test]
    fn an_endpoint_or_an_exporter_turns_traces_on() {
        const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:1/x");
        const OF_TRACES: (&str, &str) = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://t");
        for (variables, endpoint) in [
            (&[][..], None),
            (&[ENDPOINT], Some("http://c:1/x/v1/traces")),
            (&[ENDPOINT, OF_TRACES], Some("https://t/")),
            (
                &[("OTEL_TRACES_EXPORTER", "otlp")],
                Some("http://localhost:4318/v1/traces"),
            ),
            (&[ENDPOINT, ("OTEL_TRACES_EXPORTER", "none")], None),
            (&[ENDPOINT, ("OTEL_SDK_DISABLED", "True")], None),
            (
                &[ENDPOINT, ("OTEL_SDK_DISABLED", "no")],
                Some("http://c:1/x/v1/traces"),
            ),
            (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "")], None),
        ] {
            let (settings, warnings) = read(variables);
            let settings = settings.unwrap();
            let found = settings.map(|settings| settings.endpoint.to_string());
            assert_eq!(found.as_deref(), endpoint, "{variables:?}");
            assert_eq!(warnings, [""; 0]);
        }
    }

    #[test]
    fn what_is_for_traces_alone_precedes_what_is_for_all() {
        let settings = on(&[
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=b"),
            (
                "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
                " key = v%2Cw ,, other=x=y",
            ),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2500"),
        ]);
        let headers = [("key", "v,w"), ("other", "x=y")];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(settings.headers, headers);
        assert_eq!(settings.timeout, Duration::from_millis(2500));
    }

    #[test]
    fn a_service_has_the_name_that_was_chosen() {
        let attributes = (
            "OTEL_RESOURCE_ATTRIBUTES",
            "service.name=a,host.name=h,x=%E2%82%AC",
        );
        for (variables, name) in [
            (&[][..], "a-program"),
            (&[attributes], "a"),
            (&[attributes, ("OTEL_SERVICE_NAME", "b")], "b"),
        ] {
            let resource = on(variables).resource;
            let of = |key: &str| -> Vec<_> {
                let of = resource.iter().filter(|(known, _)| known == key);
                of.map(|(_, value)| value.as_str()).collect()
            };
            assert_eq!(of("service.name"), [name]);
            assert_eq!(of("service.version"), [env!("CARGO_PKG_VERSION")]);
            if !variables.is_empty() {
                assert_eq!((of("host.name"), of("x")), (vec!["h"], vec!["€"]));
            }
        }
    }

    #[test]
    fn a_sampler_keeps_its_part() {
        let half = 1 << 63;
        for (name, argument, parent, trace_id, kept) in [
            ("always_on", "", Some(false), 0, true),
            ("always_off", "", Some(true), 0, false),
            ("parentbased_always_on", "", Some(false), 0, false),
            ("parentbased_always_on", "", None, u128::MAX, true),
            ("parentbased_always_off", "", Some(true), 0, true),
            ("parentbased_always_off", "", None, 0, false),
            ("traceidratio", "0.5", Some(true), half, false),
            ("traceidratio", "0.5", None, half - 2, true),
            ("parentbased_traceidratio", "0.5", Some(true), half, true),
            ("parentbased_traceidratio", "", None, u128::MAX, true),
        ] {
            let arguments = [
                ("OTEL_TRACES_SAMPLER", name),
                ("OTEL_TRACES_SAMPLER_ARG", argument),
            ];
            let sampler = on(&arguments).sampler;
            assert_eq!(
                sampler.keeps(trace_id, parent),
                kept,
                "{name} {argument} {parent:?}"
            );
        }
    }
}
