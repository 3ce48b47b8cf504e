//! A pack's bytes: in memory, or in the scratch folder if there are many.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use common::fault::Fault;
use flate2::{Decompress, FlushDecompress, Status};
use rustix::io::Errno;

use crate::disk;

/// Bytes that are written to or read from a file at a time.
const PIECE: usize = 64 * 1024;

/// A pack as it came.
#[derive(Debug)]
pub(super) struct PackBytes {
    /// The whole pack, or what is not yet in the file.
    memory: Vec<u8>,
    file: Option<File>,
    /// Bytes in the file.
    written: u64,
    limit: usize,
    path: PathBuf,
}

impl PackBytes {
    /// Keeps up to `limit` bytes in memory; more go to a file at `path`.
    pub(super) fn new(limit: usize, path: PathBuf) -> Self {
        Self {
            memory: Vec::new(),
            file: None,
            written: 0,
            limit,
            path,
        }
    }

    /// Returns the number of bytes.
    pub(super) fn len(&self) -> u64 {
        self.written + self.memory.len() as u64
    }

    /// Appends bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.memory.extend_from_slice(bytes);
        let limit = if self.file.is_some() {
            PIECE
        } else {
            self.limit
        };
        if self.memory.len() > limit {
            self.spill().map_err(|error| self.fault(&error))?;
        }
        Ok(())
    }

    /// Ends the writing.
    pub(super) fn finish(&mut self) -> Result<(), Fault> {
        if self.file.is_some() {
            self.spill().map_err(|error| self.fault(&error))?;
            self.memory = Vec::new();
        }
        Ok(())
    }

    fn spill(&mut self) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let mut options = File::options();
                options.read(true).write(true).create_new(true);
                let file = options.open(&self.path)?;
                // It lives as long as it is open, and another pack may use the path.
                fs::remove_file(&self.path)?;
                none.insert(file)
            }
        };
        file.write_all(&self.memory)?;
        self.written += self.memory.len() as u64;
        if self.memory.capacity() > 2 * PIECE {
            self.memory = Vec::with_capacity(2 * PIECE);
        }
        self.memory.clear();
        Ok(())
    }

    /// Inflates the `size` bytes whose zlib stream begins at `start`. They were read once before.
    pub(super) fn inflate(
        &self,
        inflater: &mut Decompress,
        start: u64,
        size: usize,
    ) -> Result<Vec<u8>, Fault> {
        let changed = || Fault::infra("a pack changed while it was read");
        inflater.reset(true);
        let mut inflated = Vec::with_capacity(size);
        let mut buffer = Vec::new();
        loop {
            let at = start + inflater.total_in();
            let input = self.at(at, size - inflated.len(), &mut buffer)?;
            let before = (inflater.total_in(), inflated.len());
            let status = inflater.decompress_vec(input, &mut inflated, FlushDecompress::None);
            if matches!(status, Ok(Status::StreamEnd)) && inflated.len() == size {
                return Ok(inflated);
            }
            // A full vector has room for no byte more, but the stream's end is still to come.
            let went_on = (inflater.total_in(), inflated.len()) != before;
            if status.is_err() || !went_on || input.is_empty() {
                return Err(changed());
            }
        }
    }

    /// Returns bytes from `at` onwards. `wanted` bytes of output are missing, which sizes the read.
    fn at<'a>(
        &'a self,
        at: u64,
        wanted: usize,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], Fault> {
        let Some(file) = &self.file else {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            return Ok(self.memory.get(at..).unwrap_or_default());
        };
        // Deflated bytes are seldom more than the inflated ones.
        buffer.resize((wanted + 64).min(PIECE), 0);
        let read = file.read_at(buffer, at);
        let read = read.map_err(|error| self.fault(&error))?;
        Ok(&buffer[..read])
    }

    fn fault(&self, error: &io::Error) -> Fault {
        let message = format!("cannot keep a pack in {}: {error}", self.path.display());
        let refusal = Errno::from_io_error(error).and_then(|errno| disk::refusal(&message, errno));
        refusal.unwrap_or_else(|| Fault::infra(message))
    }
}
