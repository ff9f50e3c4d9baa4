"""The load of the overload bench, against a server of a few lines."""

from __future__ import annotations

import asyncio

import numpy as np

from genretrieval_serving.open_loop import OpenLoad, Probes


class Server(asyncio.Protocol):
    """200 and 429 in turn, head and body apart."""

    asked = 0
    open = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        Server.open += 1

    def connection_lost(self, exc: Exception | None) -> None:
        Server.open -= 1

    def data_received(self, data: bytes) -> None:
        Server.asked += 1
        status = 200 if data.startswith(b"GET") or Server.asked % 2 else 429
        self.transport.write(b"HTTP/1.1 %d said\r\nContent-Length: 5\r\n\r\n" % status)
        self.transport.write(b"hello")


def test_every_request_leaves_and_what_comes_back_is_noted() -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
        load = OpenLoad(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", [b"POST"])
        answers = await load.open(500.0, 0.4, np.random.default_rng(0))
        assert len(answers.due) == len(answers.took) == Server.asked > 100
        assert set(answers.status.tolist()) == {200, 429}
        assert (answers.took >= answers.late).all()
        assert len(answers.ms(200)) + len(answers.ms(429)) == Server.asked
        assert 0 < len(answers.ms(200, since=0.1, until=0.2)) < len(answers.ms(200))
        assert await load.closed(2, 0.05) > 0
        probes = Probes(load)
        probing = asyncio.create_task(probes.run())
        await asyncio.sleep(0.02)
        probing.cancel()
        assert (probes.failed, bool(probes.slowest)) == (0, True)
        load.close()
        server.close()
        await asyncio.sleep(0.02)
        assert Server.open == 0

    asyncio.run(main())
