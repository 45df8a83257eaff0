"""A TCP proxy before an HTTP server that does what networks and servers do at their worst. Loopback only."""

import asyncio
import re
import threading


class Faulty:
    """Passes bytes to `port` on loopback, until told to misbehave; `hits` counts the faults that were really made, `passed` the bytes of bodies and answers.

    cut_up, cut_down: close both sides after that many bytes went up (to the server) or down in one connection.
    status: answer requests with (code, Retry-After seconds or None) without passing them on.
    times: how many faults to make before all is well again (None: for ever).
    rate: bytes per second in each direction of a connection (None: as fast as it goes).
    """

    def __init__(self, port: int):
        self.target, self.port = port, 0
        self.cut_up = self.cut_down = self.status = self.times = self.rate = None
        self.hits = self.passed = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.ready = threading.Event()

    def __enter__(self) -> "Faulty":
        self.thread.start()
        self.ready.wait(10)
        return self

    def __exit__(self, *_) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    def well(self) -> None:
        """No more faults."""
        self.cut_up = self.cut_down = self.status = self.times = self.rate = None

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        server = self.loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        self.loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()

    def _strike(self) -> bool:
        if self.times is not None and self.times <= 0:
            return False
        if self.times is not None:
            self.times -= 1
        self.hits += 1
        return True

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        ends = (writer, up_writer)
        try:
            await asyncio.gather(
                self._up(reader, up_writer, writer, ends), self._pass(up_reader, writer, ends, "cut_down")
            )
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            for end in ends:
                end.transport.abort()

    async def _up(self, reader, server, client, ends) -> None:
        """Requests, one by one, so that an answer can be put in the place of the server's."""
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int((re.search(rb"(?i)\r\ncontent-length: *(\d+)", head) or [0, 0])[1])
            if self.status and self._strike():
                while length > 0:
                    length -= len(await reader.read(min(length, 65536)) or b" " * length)
                code, after = self.status
                wait = f"Retry-After: {after}\r\n" if after is not None else ""
                client.write(f"HTTP/1.1 {code} Fault\r\n{wait}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
                await client.drain()
                client.close()
                raise OSError
            server.write(head)
            await self._pass(reader, server, ends, "cut_up", length)

    async def _pass(self, reader, writer, ends, fault: str, left: int | None = None) -> None:
        passed = 0
        while left is None or left > 0:
            data = await reader.read(65536 if left is None else min(65536, left))
            if not data:
                raise OSError
            passed += len(data)
            self.passed += len(data)
            left = None if left is None else left - len(data)
            limit = getattr(self, fault)
            if limit is not None and passed > limit and self._strike():
                for end in ends:
                    end.transport.abort()
                raise OSError
            if self.rate:
                await asyncio.sleep(len(data) / self.rate)
            writer.write(data)
            await writer.drain()
