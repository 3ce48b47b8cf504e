#!/usr/bin/env python3
"""Receives traces by OTLP over HTTP and prints each as a tree, once its job has ended.

Needs `pip install opentelemetry-proto`, the official definitions. A collector for a look, not for keeps.
"""

import argparse
import collections
import gzip
import http.server
import sys

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

# What is shown of a span besides its name and time.
SHOWN = ("repofleet.repository", "repofleet.attempt", "repofleet.outcome", "repofleet.reason", "error.type",
         "repofleet.fetch_way", "repofleet.fetched_bytes", "repofleet.stored_bytes")

traces = collections.defaultdict(list)
printed = set()


def attributes(pairs):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def has_ended(spans):
    outcomes = [attributes(span.attributes).get("repofleet.outcome") for _, span in spans if span.name == "job"]
    enqueued = any(span.name == "enqueue" for _, span in spans)
    return enqueued and any(outcome not in (None, "retry", "handed_back") for outcome in outcomes)


def tree(spans, parent, depth, begin):
    lines = []
    for service, span in sorted(spans, key=lambda pair: pair[1].start_time_unix_nano):
        if span.parent_span_id != parent:
            continue
        of = attributes(span.attributes)
        after = (span.start_time_unix_nano - begin) / 1e6
        took = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6
        shown = [f"{key.removeprefix('repofleet.')}={of[key]}" for key in SHOWN if key in of]
        if span.status.code == Status.STATUS_CODE_ERROR:
            shown.append(f"({span.status.message})")
        if span.kind in (Span.SPAN_KIND_PRODUCER, Span.SPAN_KIND_CONSUMER):
            shown.append(f"[{service}]")
        lines.append(f"{'  ' * depth + span.name:<24} +{after:9.1f} ms {took:9.1f} ms  {' '.join(shown)}".rstrip())
        lines += tree(spans, span.span_id, depth + 1, begin)
    return lines


def show(trace_id):
    spans = traces[trace_id]
    known = {span.span_id for _, span in spans}
    begin = min(span.start_time_unix_nano for _, span in spans)
    print(f"trace {trace_id.hex()}")
    # What an unknown span is the whole of comes first: its process was killed, or has not sent it yet.
    for parent in sorted({span.parent_span_id for _, span in spans} - known):
        print("\n".join(tree(spans, parent, 1, begin)))
    print(flush=True)
    printed.add(trace_id)


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        for process in request.resource_spans:
            service = attributes(process.resource.attributes)["service.name"]
            for scope in process.scope_spans:
                for span in scope.spans:
                    traces[span.trace_id].append((service, span))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()
        for trace_id in [t for t, spans in traces.items() if t not in printed and has_ended(spans)]:
            show(trace_id)

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=4318, help="on 127.0.0.1; default: 4318")
    parser.add_argument("--count", type=int, help="end after so many traces")
    arguments = parser.parse_args()
    server = http.server.HTTPServer(("127.0.0.1", arguments.port), Receiver)
    try:
        while arguments.count is None or len(printed) < arguments.count:
            server.handle_request()
    except KeyboardInterrupt:
        for trace_id in [t for t in traces if t not in printed]:
            show(trace_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
