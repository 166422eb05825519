"""Retrieval over HTTP: files that go on where they stopped and are kept only if they are sound; each failure explained."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import responses
from pathlib import Path

import pooch
import requests
from tqdm import tqdm
from urllib3.exceptions import NameResolutionError

from .errors import InputError
from .files import disk_error, write_atomic

TIMEOUT = 60  # seconds without a byte after which a connection counts as cut
TRIES = 5  # failures without a new byte between them after which a retrieval gives up
LONGEST_WAIT = 300  # seconds: a service that asks for more is left alone until the user comes back
STEPS = {  # what a user does next, by HTTP status; services add what they know better
    401: "sign in: this service gives the file to known users only",
    403: "open its page in a browser, sign in and accept its terms, then run this again",
    404: "the file is not there (any more): look for its new place, or give the folder of your own copy",
    400: "the service does not take this request: open its page in a browser and download from there",
    429: "too many requests: wait a while, then run this again; it goes on where it stopped",
    500: "the service is in trouble: run this again later; it goes on where it stopped",
    None: "check the connection (proxy, firewall), then run this again; it goes on where it stopped",
}
_CHUNK = 1 << 16  # bytes: what a cut loses at most
_PASSING = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
_BAD_KEY = (requests.exceptions.InvalidHeader, UnicodeError)  # both quote the key they could not send

Ask = Callable[[dict[str, str]], requests.Response]  # request headers -> streamed answer; raises requests.HTTPError from 400 on
sleep = time.sleep


class _Patient(requests.adapters.HTTPAdapter):
    def send(self, request, stream=False, timeout=None, **more):
        return super().send(request, stream, timeout or TIMEOUT, **more)


class Session(requests.Session):
    """A requests session that waits at most TIMEOUT for a byte and carries `key` (header X-Dataverse-key) to no other host."""

    def __init__(self, key: str | None = None):
        super().__init__()
        self.headers.update({"X-Dataverse-key": key} if key else {})
        limit_waiting(self)

    def rebuild_auth(self, prepared_request, response):
        super().rebuild_auth(prepared_request, response)
        if self.should_strip_auth(response.request.url, prepared_request.url):
            prepared_request.headers.pop("X-Dataverse-key", None)

    def ask(self, url: str) -> Ask:
        """How to ask for `url`."""

        def get(headers: dict[str, str]) -> requests.Response:
            answer = self.get(url, headers=headers, stream=True)
            answer.raise_for_status()
            return answer

        return get


def byte_bar(name: str, total: int | None = None) -> tqdm:
    """A progress bar in bytes, which says less often how far it is where it is no terminal that reads it."""
    return tqdm(desc=name, total=total, unit="B", unit_scale=True, mininterval=1 if sys.stderr.isatty() else 15)


def limit_waiting(session: requests.Session) -> None:
    """Ends each wait of `session` for a byte after TIMEOUT seconds."""

    for scheme in ("https://", "http://"):
        session.mount(scheme, _Patient())


def retrieve(ask: Ask, target: Path, known_hash: str | None = None, steps: dict | None = None,
             loads: Callable[[Path], bool] | None = None, bar: tqdm | None = None, unpacked: bool = False) -> Path:
    """Brings a file to `target`, where it appears complete or not at all.

    What has arrived waits in `<target>.part`; the rest alone is asked for (HTTP Range), in this call and in the next one,
    as long as the service honours it; without a `known_hash` also only if ETag or Last-Modified say that it is the same file.
    known_hash: "md5:..." or another algorithm of pooch; a file that is there and has it is not fetched again.
    loads: whether the complete file is sound, asked before it gets its name; for services that give no checksum.
    unpacked: it will be unpacked on the same disk, which needs the room for that too.
    steps: what the user does next, by HTTP status, over STEPS. bar: counts the bytes; one of its own by default.
    Raises InputError, with the next step to take, where the service, the network, the disk or the checksum say no.
    """
    target = target.absolute()
    waiting = part(target)

    def download(_url, output, _pooch):
        with byte_bar(target.name) if bar is None else contextlib.nullcontext(bar) as shown:
            persist(lambda: _continue(ask, waiting, known_hash is not None, shown, unpacked), target.name, steps, lambda: length(waiting))
        _tag(waiting).unlink(missing_ok=True)
        os.replace(waiting, output)
        if loads and not loads(Path(output)):
            raise ValueError("does not load")

    pooch.get_logger().setLevel("WARNING")
    for goes_on in (waiting.exists(), False):
        try:
            pooch.retrieve(target.as_uri(), known_hash, target.name, target.parent, downloader=download)
            return target
        except InputError:
            raise
        except ValueError:  # it has another checksum, or does not load
            if goes_on:
                print(f"{target.name}: what was there before does not fit the rest, starting anew", flush=True)
                continue
        except OSError as error:
            raise disk_error(target, error) from None
        break
    raise InputError(f"{target.name} arrived damaged ({f'its checksum is not {known_hash}' if known_hash else 'it does not load'}) "
                     "and was not kept: run this again, or download it in a browser and give its path")


def persist(action: Callable, what: str, steps: dict | None = None, got: Callable[[], int] = lambda: 0):
    """The result of `action()`, tried again after a cut connection, a 429 (after its Retry-After) or a server's error.

    Waits 2, 4, 8 ... s; gives up after TRIES failures between which `got()` (bytes here) did not grow. Raises InputError naming
    `what` and the next step. No text of the service or of requests is repeated: either may hold a key or a signed address.
    """
    most, failures = got(), 0
    while True:
        try:
            return action()
        except InputError:
            raise
        except (requests.RequestException, ValueError) as error:
            answer = getattr(error, "response", None)
            status = 401 if isinstance(error, _BAD_KEY) else None if answer is None else answer.status_code
            problem, asked = _problem(error, status), _retry_after(answer)
            passing = (status == 429 or status >= 500) if status else isinstance(error, _PASSING)
        failures = 1 if got() > most else failures + 1
        most = max(most, got())
        wait = 2 ** failures if asked is None else asked
        if not passing or failures >= TRIES or wait > LONGEST_WAIT:
            more = f" and asks to wait {wait / 60:.0f} min" if wait > LONGEST_WAIT else ""
            known = STEPS | (steps or {})
            step = known.get(status, known[status // 100 * 100 if status and status >= 400 else None])
            break
        print(f"{what}: {problem}; trying again in {wait:.0f} s", flush=True)
        sleep(wait)
    raise InputError(f"{what}: {problem}{more}: {step}")


def need_space(folder: str | Path, needed: int) -> None:
    """Raises InputError, which names both, if `folder`'s disk has less than `needed` bytes free."""
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(f"{folder} needs {_size(needed)} and its disk has {_size(free)} free: free {_size(needed - free)}, or choose "
                         "a folder on another disk, then run this again")


def part(target: Path) -> Path:
    """Where what has arrived of `target` waits for the rest."""
    return target.with_name(target.name + ".part")


def length(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _continue(ask: Ask, part: Path, hashed: bool, bar: tqdm, unpacked: bool) -> None:
    """Asks once for what `part` lacks and appends it. Raises requests' errors where that ends early."""
    tag = _tag(part).read_text() if _tag(part).exists() else ""
    have = length(part) if hashed or tag else 0
    headers = {"Accept-Encoding": "identity"}  # bytes as they lie on the service's disk, so that ranges and lengths fit
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag} if tag else {})
    try:
        answer = ask(headers)
    except requests.HTTPError as error:
        if not have or error.response.status_code != 416:
            raise
        if error.response.headers.get("Content-Range") == f"bytes */{have}":
            return
        part.unlink()
        return _continue(ask, part, hashed, bar, unpacked)
    with answer:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        now = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        if answer.status_code != 206:
            have, total = 0, int(answer.headers.get("Content-Length", 0))
        elif found and int(found[1]) == have and tag in (now, ""):
            total = int(found[2])
        else:
            part.unlink(missing_ok=True)
            raise requests.ConnectionError("not the bytes asked for")
        need_space(part.parent, total - have + unpacked * total)
        part.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(_tag(part), now)
        bar.total = bar.total or total - have or None
        with open(part, "ab" if have else "wb") as file:
            for chunk in answer.iter_content(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total and length(part) != total:
        raise requests.ConnectionError("cut")


def _problem(error: Exception, status: int | None) -> str:
    if isinstance(error, _BAD_KEY):
        return "the key or token holds characters that none has"
    if status:
        return f"the service answered {status} ({responses.get(status, 'of its own')})"
    if isinstance(error, requests.Timeout):
        return f"no answer within {TIMEOUT} s"
    if isinstance(error, requests.exceptions.SSLError):
        return "the service's certificate is not trusted here"
    if any(isinstance(getattr(cause, "reason", None), NameResolutionError) for cause in error.args):
        return "the service's name could not be resolved (DNS)"
    return "the connection was cut" if isinstance(error, _PASSING) else "the service's answer makes no sense here"


def _retry_after(answer: requests.Response | None) -> float | None:
    text = "" if answer is None else answer.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # neither seconds nor a date: the service names no time
        return None


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e3:.0f} kB"
