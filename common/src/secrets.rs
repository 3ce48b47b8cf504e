//! Secrets from files: `NAME_FILE` names a file that holds what the variable `NAME` would.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::exit::{self, ExitError};

/// The variables that hold a secret, or may.
pub const VARIABLES: [&str; 10] = [
    "BROKER_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "R2_ACCESS_KEY",
    "R2_SECRET_KEY",
    "GITHUB_TOKEN",
    "FETCH_PROXY",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
];

/// Longest content; no secret is longer.
const MAX_BYTES: u64 = 64 << 10;

/// Goes on as the same program with each secret in its variable, if one of them is in a file; returns
/// if none is. Call it first in `main`: it makes no difference to anything else where a secret was.
///
/// # Errors
/// [`exit::USAGE`] if a file cannot be read, or a secret is given twice.
pub fn from_files() -> Result<(), ExitError> {
    let read = read(|name| std::env::var_os(name));
    let read = read.map_err(|why| ExitError::new(exit::USAGE, why))?;
    if read.is_empty() {
        return Ok(());
    }
    let failed = |error: io::Error| {
        let why = format!("cannot start again with secrets from files: {error}");
        ExitError::new(exit::INTERNAL, why)
    };
    let mut again = Command::new(std::env::current_exe().map_err(failed)?);
    let mut arguments = std::env::args_os();
    again
        .arg0(arguments.next().unwrap_or_default())
        .args(arguments);
    for (name, secret) in &read {
        again.env(name, secret).env_remove(file_variable(name));
    }
    Err(failed(again.exec()))
}

fn file_variable(name: &str) -> String {
    format!("{name}_FILE")
}

/// Reads the secrets that are in files.
fn read(
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Vec<(&'static str, String)>, String> {
    let given = |name: &str| variable(name).filter(|value| !value.is_empty());
    let mut secrets = Vec::new();
    for name in VARIABLES {
        let file_variable = file_variable(name);
        let Some(path) = given(&file_variable) else {
            continue;
        };
        if given(name).is_some() {
            return Err(format!(
                "{name} and {file_variable} are both set: empty one of them"
            ));
        }
        let secret =
            read_file(&path).map_err(|why| format!("{file_variable}={}: {why}", path.display()))?;
        secrets.push((name, secret));
    }
    Ok(secrets)
}

/// Reads a file without the line end at its end. No error repeats any of it.
fn read_file(path: &OsStr) -> Result<String, String> {
    let mut secret = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut secret))
        .map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => {
                "the file is not text; give one with the secret alone".to_owned()
            }
            _ => format!("cannot read the file: {error}"),
        })?;
    if secret.len() as u64 > MAX_BYTES {
        return Err(format!(
            "the file has more than {MAX_BYTES} bytes; give one with the secret alone"
        ));
    }
    if secret.ends_with('\n') {
        secret.pop();
    }
    if secret.ends_with('\r') {
        secret.pop();
    }
    match secret.trim().is_empty() || secret.contains(char::is_control) {
        true => {
            Err("the file holds no secret on one line; give one with the secret alone".to_owned())
        }
        false => Ok(secret),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Reads with these variables, of which those in `folder` are files.
    fn reading(
        folder: &Path,
        variables: &[(&str, &str)],
    ) -> Result<Vec<(&'static str, String)>, String> {
        read(|name| {
            let (_, value) = variables.iter().find(|(known, _)| *known == name)?;
            Some(match name.ends_with("_FILE") && !value.is_empty() {
                true => folder.join(value).into(),
                false => value.into(),
            })
        })
    }

    #[test]
    fn a_secret_is_what_its_file_holds_without_the_line_end() {
        let folder = tempfile::tempdir().unwrap();
        for (content, expected) in [
            ("sesame", "sesame"),
            ("sesame\n", "sesame"),
            ("sesame\r\n", "sesame"),
            (" two words ", " two words "),
        ] {
            std::fs::write(folder.path().join("secret"), content).unwrap();
            let variables = [("GITHUB_TOKEN_FILE", "secret"), ("GITHUB_TOKEN", "")];
            let read = reading(folder.path(), &variables).unwrap();
            assert_eq!(read, [("GITHUB_TOKEN", expected.to_owned())]);
        }
        assert_eq!(
            reading(folder.path(), &[("GITHUB_TOKEN_FILE", "")]),
            Ok(Vec::new())
        );
        assert_eq!(
            reading(folder.path(), &[("AWS_WEB_IDENTITY_TOKEN_FILE", "x")]),
            Ok(Vec::new())
        );
    }

    #[test]
    fn what_is_wrong_names_variable_and_file_and_no_secret() {
        let folder = tempfile::tempdir().unwrap();
        let long = "sesame".repeat(20_000);
        for (name, content) in [("blank", " \n"), ("long", &long), ("nul", "ses\0ame")] {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        std::fs::write(folder.path().join("bytes"), b"\xffsesame").unwrap();
        for (file, why) in [
            ("missing", "cannot read the file: No such file"),
            ("blank", "holds no secret"),
            ("nul", "holds no secret"),
            ("long", "more than 65536 bytes"),
            ("bytes", "is not text"),
        ] {
            let error = reading(folder.path(), &[("BROKER_URL_FILE", file)]).unwrap_err();
            let path = folder.path().join(file).display().to_string();
            assert!(
                error.starts_with(&format!("BROKER_URL_FILE={path}: ")),
                "{error}"
            );
            assert!(error.contains(why) && !error.contains("ses"), "{error}");
        }
        let both = [
            ("BROKER_URL", "amqp://sesame@rabbit"),
            ("BROKER_URL_FILE", "nul"),
        ];
        let error = reading(folder.path(), &both).unwrap_err();
        assert_eq!(
            error,
            "BROKER_URL and BROKER_URL_FILE are both set: empty one of them"
        );
    }
}
