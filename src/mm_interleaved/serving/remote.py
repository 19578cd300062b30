"""Images from other hosts: only from listed ones, at the address that was checked, and never from inside a network."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence

import httpx2

from .budget import Share
from .errors import ApiError

MOST_REDIRECTS = 3
SECONDS = 10.0
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, also if it is written inside another one."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if any(inner):
            return False  # such addresses lead to an IPv4 address by way of a gateway
        if address in ipaddress.ip_network("64:ff9b::/96") or address in ipaddress.ip_network("64:ff9b:1::/48"):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class RemoteImages:
    """Fetches images from listed hosts.

    Args:
        hosts: `name` (ports 80 and 443) or `name:port`; empty: nothing is fetched.
        most_bytes: most bytes of an image.
        allowed: whether an address may be contacted.
    """

    def __init__(self, hosts: Sequence[str], most_bytes: int, allowed: Callable[[Address], bool] = is_public) -> None:
        self.hosts = {host.lower().rstrip(".") for host in hosts}
        self.most_bytes, self.allowed = most_bytes, allowed

    async def fetch(self, url: str, param: str, share: Share) -> bytes:
        """The bytes at a URL, which are taken from `share` while they arrive.

        Raises:
            ApiError: its host is not listed, its address is not public, or it cannot be downloaded.
            Overloaded: the bodies of all requests take too much memory.
        """
        failed = ApiError("the image cannot be downloaded", param=param, code="failed_to_download_image")
        try:
            async with asyncio.timeout(SECONDS):
                for _ in range(MOST_REDIRECTS + 1):
                    found = await self._get(self._checked(url, param), param, share)
                    if isinstance(found, bytes):
                        return found
                    url = found
        except (TimeoutError, httpx2.HTTPError, OSError, UnicodeError):
            raise failed from None
        raise failed

    def _checked(self, url: str, param: str) -> httpx2.URL:
        refused = ApiError("images are not fetched from this URL; send the image as a data: URL", param=param,
                           code="invalid_image_url")  # fmt: skip
        if any(ord(c) <= 32 or c in "\\\x7f" for c in url):
            raise refused
        try:
            parsed = httpx2.URL(url)
        except (httpx2.InvalidURL, UnicodeError, ValueError):
            raise refused from None
        host = parsed.host.lower().rstrip(".")
        port = parsed.port or {"http": 80, "https": 443}.get(parsed.scheme, 0)
        listed = f"{host}:{port}" in self.hosts or (host in self.hosts and port in (80, 443))
        if parsed.scheme not in ("http", "https") or parsed.userinfo or not host or not listed:
            raise refused
        return parsed

    async def _get(self, url: httpx2.URL, param: str, share: Share) -> bytes | str:
        """The body, or the URL of a redirect."""
        address = await self._resolve(url, param)
        port = url.port or (443 if url.scheme == "https" else 80)
        name = url.host if url.port is None else f"{url.host}:{port}"
        pinned = url.copy_with(host=str(address), port=port)
        headers = {"Host": name, "Accept": "image/png, image/jpeg, image/webp", "Accept-Encoding": "identity"}
        extensions = {"sni_hostname": url.host}
        async with (
            httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=SECONDS) as client,
            client.stream("GET", pinned, headers=headers, extensions=extensions) as response,
        ):
            if response.is_redirect:
                return str(url.join(response.headers.get("location", "")))
            response.raise_for_status()
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                share.take(bytes=len(chunk))
                if len(body) > self.most_bytes:
                    raise ApiError("the image's file is too large", param=param, code="image_file_too_large")
            return bytes(body)

    async def _resolve(self, url: httpx2.URL, param: str) -> Address:
        """The address to contact; all addresses of the host must be allowed."""
        port = url.port or (443 if url.scheme == "https" else 80)
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        if not addresses or not all(self.allowed(address) for address in addresses):
            raise ApiError("images are not fetched from this URL; send the image as a data: URL", param=param,
                           code="invalid_image_url")  # fmt: skip
        return addresses[0]
