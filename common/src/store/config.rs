//! Which store to use: a folder or a bucket.

use std::path::Path;
use std::sync::Arc;

use clap::Args;

use crate::exit::{self, ExitError};
use crate::store::SharedStore;
use crate::store::fs::FsStore;
use crate::store::s3::S3Store;
use crate::store::s3::config::S3Config;
use crate::text::unsubstituted;

/// Where digests are kept.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Store")]
pub struct StoreConfig {
    /// Where digests are kept: a folder, or s3://BUCKET[/PREFIX] with endpoint and credentials in
    /// AWS_* or R2_* variables [default: ./digests, or R2_BUCKET where that is set].
    #[arg(long, env = "STORE_URL", value_name = "FOLDER|URL")]
    pub store: Option<String>,
}

/// The folder if nothing else is configured.
const DEFAULT_FOLDER: &str = "./digests";

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

impl StoreConfig {
    /// The option's value; a variable that is empty counts as not set.
    fn place(&self) -> Option<&str> {
        self.store
            .as_deref()
            .filter(|place| !place.trim().is_empty())
    }

    /// The folder, if the store is one.
    pub fn folder(&self) -> Option<&Path> {
        match self.place() {
            Some(place) => (!place.contains("://")).then(|| Path::new(place)),
            None if S3Config::is_predecessors(environment) => None,
            None => Some(Path::new(DEFAULT_FOLDER)),
        }
    }

    /// Opens the store. Nothing is read or written yet.
    ///
    /// # Errors
    /// [`exit::USAGE`] for a place that is not supported, or whose configuration is incomplete.
    pub fn open(&self) -> Result<SharedStore, ExitError> {
        if let Some(folder) = self.folder() {
            let place = folder.to_string_lossy();
            if let Some(why) = unsubstituted("--store", &place) {
                return Err(ExitError::new(exit::USAGE, why));
            }
            if let Some(bucket) = place.strip_prefix("s3:") {
                let bucket = bucket.trim_start_matches('/');
                let why = format!(
                    "--store {place}: a bucket is s3://{bucket}; a folder of that name is ./{place}"
                );
                return Err(ExitError::new(exit::USAGE, why));
            }
            return Ok(Arc::new(FsStore::new(folder)));
        }
        let config = S3Config::from_env(self.place(), environment)
            .map_err(|why| ExitError::new(exit::USAGE, why))?;
        Ok(Arc::new(S3Store::new(&config)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in `.env.example`: R2_BUCKET must not be passed over silently.
    #[test]
    fn an_empty_store_url_counts_as_not_set() {
        for store in [None, Some(""), Some(" ")] {
            let config = StoreConfig {
                store: store.map(str::to_owned),
            };
            assert_eq!(config.folder(), Some(Path::new(DEFAULT_FOLDER)));
        }
    }
}
