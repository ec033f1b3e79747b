"""A reward model as a server, which PPO asks over HTTP: on another machine, or shared by several runs.

    python examples/reward_server.py runs/helpdesk/reward --port 8000
    tieback ppo --reward_funcs http://127.0.0.1:8000 --critic_init policy

It listens on this machine alone. On a network put it behind what encrypts and asks for a token (TIEBACK_REWARD_TOKEN is sent as a
bearer token). Left out: batches across requests, which a serving engine has.
"""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tieback.pipeline.scorers import load_reward_scorer


def make_server(model: str, port: int = 0, batch_size: int = 64) -> ThreadingHTTPServer:
    """A server of the reward model that is named; `serve_forever` starts it. Port 0 takes any that is free."""
    scorer = load_reward_scorer(model, batch_size, "model")
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        """Answers `{"prompts": […], "completions": […]}` with `{"rewards": […]}`."""

        def do_POST(self) -> None:
            """Score what was sent."""
            try:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with one_at_a_time:
                    rewards = scorer.score(body["prompts"], body["completions"])
            except (KeyError, TypeError, ValueError) as error:
                self.send_error(400, explain=str(error))
                return
            answer = json.dumps({"rewards": rewards}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or hub name of the reward model")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    server = make_server(args.model, args.port)
    print(f"Rewards of {args.model} at http://127.0.0.1:{server.server_port}")
    server.serve_forever()
