"""Servers for the benchmarks and comparisons: git over HTTP, certificates, and a network in between."""

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RELEASE = REPOSITORY / "target" / "release"
NOWHERE = subprocess.DEVNULL
BUILD = "cargo build --release --locked --workspace --bins --example git-server"

# Prints what a command took on its own. It is small, since a process counts the memory of the one that
# it was forked from as its own.
MEASURE = """
import os, resource, sys, time
os.set_inheritable(int(sys.argv[1]), False)
start = time.monotonic()
process = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(process, 0)
seconds = time.monotonic() - start
with open(int(sys.argv[1]), "w") as file:
    print(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, seconds, file=file)
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


def measured(command, **keywords):
    """Seconds of CPU of a command and its children, bytes of its largest process, and its duration."""
    reader, writer = os.pipe()
    command = [sys.executable, "-I", "-S", "-c", MEASURE, writer, *command]
    command = [str(word) for word in command]
    process = subprocess.Popen(command, pass_fds=[writer], **keywords)
    os.close(writer)
    with open(reader) as file:
        figures = file.read().split()
    if process.wait() != 0:
        sys.exit(f"{' '.join(command[6:])} ended with {process.returncode}")
    return float(figures[0]), int(figures[1]), float(figures[2])


class GitServer:
    """Serves bare repositories ROOT/OWNER/NAME.git over HTTP on this machine, until it is stopped."""

    def __init__(self, root, programs, *options):
        program = Path(programs) / "examples" / "git-server"
        if not program.exists():
            sys.exit(f"there is no {program}; {BUILD}")
        command = [program, "--root", root, "--listen", "127.0.0.1:0", "--stats", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1]
        self.authority = self.url.removeprefix("http://")

    def stop(self):
        """Returns what was asked for, by repository."""
        self.process.send_signal(signal.SIGTERM)
        output, _ = self.process.communicate()
        return {asked["repo"]: asked for asked in map(json.loads, output.splitlines())}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()


def serve_together(corpora, root, spelled=str):
    """Links repositories CORPUS/OWNER/NAME.git into one folder, and returns their names as `spelled`.

    A repository of one commit says that it is shallow, which libgit2 does not fetch from: not here.
    """
    names = set()
    for repository in sorted(path for corpus in corpora for path in corpus.resolve().glob("*/*.git")):
        name = spelled(f"{repository.parent.name}/{repository.stem}")
        served = root / f"{name}.git"
        served.mkdir(parents=True)
        for part in repository.iterdir():
            if part.is_dir():
                (served / part.name).symlink_to(part)
            elif part.name != "shallow":
                # git takes no link for HEAD.
                shutil.copyfile(part, served / part.name)
        names.add(name)
    if not names:
        sys.exit(f"no repositories {corpora[0]}/OWNER/NAME.git")
    return sorted(names)


class Certificate:
    """A certificate for 127.0.0.1, and the authority that vouches for it."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.file = self.folder / "authority.pem"
        self.make("authority", "CA:TRUE")
        signed = ["-CA", self.file, "-CAkey", self.folder / "authority.key"]
        self.make("server", "CA:FALSE", "-addext", "subjectAltName=IP:127.0.0.1", *signed)
        # Reading all that a system trusts is part of what TLS costs.
        system = Path(ssl.get_default_verify_paths().cafile or os.devnull).read_bytes()
        self.file.write_bytes(system + b"\n" + self.file.read_bytes())

    def make(self, name, constraints, *options):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "2", *options]
        command += ["-subj", f"/CN=repofleet {name}", "-addext", f"basicConstraints=critical,{constraints}"]
        command += ["-keyout", self.folder / f"{name}.key", "-out", self.folder / f"{name}.pem"]
        subprocess.run(command, check=True, capture_output=True)

    def context(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "server.pem", self.folder / "server.key")
        return context


class Network:
    """Passes connections on to a server, and counts bytes: those of a client, TLS included.

    `delay` is the time for a round trip, in seconds. A connection takes one too. With a certificate
    it speaks TLS.
    """

    def __init__(self, authority, delay=0.0, certificate=None):
        self.host, _, self.port = authority.partition(":")
        self.delay = delay
        self.bytes = 0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        # TLS has a stage of its own, so that its handshake is delayed too.
        target = self.host, int(self.port)
        if certificate:
            target = self.call(self.listen(target, certificate.context(), None))
        _, port = self.call(self.listen(target, None, self.delayed))
        self.authority = f"127.0.0.1:{port}"
        self.url = f"http{'s' if certificate else ''}://{self.authority}"

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def take(self):
        """Returns the bytes so far, and starts again."""
        taken, self.bytes = self.bytes, 0
        return taken

    async def listen(self, target, tls, way):
        async def connected(reader, writer):
            try:
                to_reader, to_writer = await asyncio.open_connection(*target)
            except OSError:
                writer.close()
                return
            way_of = way or self.copied
            await asyncio.gather(way_of(reader, to_writer, 1.0), way_of(to_reader, writer, 0.0))

        server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls, limit=1 << 20)
        return server.sockets[0].getsockname()

    async def copied(self, reader, writer, _late):
        try:
            while data := await reader.read(1 << 18):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def delayed(self, reader, writer, late):
        """Copies each piece half a round trip later; if it is `late`, the first one a whole one more."""
        queue = asyncio.Queue()

        async def written():
            try:
                while (piece := await queue.get())[1]:
                    await asyncio.sleep(piece[0] - self.loop.time())
                    writer.write(piece[1])
                    await writer.drain()
            except OSError:
                pass
            finally:
                writer.close()

        task = asyncio.ensure_future(written())
        at = self.loop.time() + late * 1.5 * self.delay
        try:
            while data := await reader.read(1 << 18):
                self.bytes += len(data)
                at = max(at, self.loop.time() + self.delay / 2)
                queue.put_nowait((at, data))
        except OSError:
            pass
        queue.put_nowait((0, b""))
        await task
