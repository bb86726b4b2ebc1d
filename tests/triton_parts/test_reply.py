"""The end of a reply is its end: Triton dies when a sender is used after it."""

from __future__ import annotations

from types import SimpleNamespace

from trtllm_memshare.triton.reply import Reply


class FakeSender:
    """A response sender that dies, as Triton's does, when it is asked after its end."""

    def __init__(self):
        self.sent, self.ended = [], False

    def send(self, response=None, flags=0):
        assert not self.ended, "sent after the end"
        self.sent.append(response)
        self.ended = bool(flags)

    def is_cancelled(self):
        assert not self.ended, "segmentation fault"
        return False


def test_an_ended_reply_is_neither_asked_nor_written_again():
    pb = SimpleNamespace(TRITONSERVER_RESPONSE_COMPLETE_FINAL=1)
    sender = FakeSender()
    reply = Reply(pb, sender)
    reply.send("a")
    assert not reply.is_cancelled()
    reply.end("b")
    reply.end("c")
    reply.send("d")
    assert not reply.is_cancelled()
    assert sender.sent == ["a", "b"]
