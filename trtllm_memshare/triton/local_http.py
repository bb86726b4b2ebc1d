"""Calls to a server of this machine, past any proxy: ``http_proxy`` is meant for what lies outside."""

from __future__ import annotations

import urllib.request

open_local = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
"""``urllib.request.urlopen`` without proxies."""
