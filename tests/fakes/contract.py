"""How a stand-in says that a contract was broken."""

from __future__ import annotations


class ContractError(AssertionError):
    """Something that the recorded contract does not allow."""


def require(condition, text):
    if not condition:
        raise ContractError(text)
