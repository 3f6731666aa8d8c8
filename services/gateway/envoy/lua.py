"""The Lua filters: which key jwt_authn tries, who the consumer is after it, and what HTTP calls an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.gateway.envoy.types import Edge

HINT_HEADER = "x-jwt-hint"
METADATA = "edge"
"""Namespace of the dynamic metadata that the consumer's groups are kept in."""
JWT_FILTER = "envoy.filters.http.jwt_authn"

_HINT = """
local known = {%(known)s}
local alphabet = {}
do
  local letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
  for i = 1, #letters do alphabet[letters:byte(i)] = i - 1 end
end
local function decode(text)
  local out, bits, value = {}, 0, 0
  for i = 1, #text do
    local six = alphabet[text:byte(i)]
    if six == nil then return nil end
    value = (value * 64 + six) %% 16777216
    bits = bits + 6
    if bits >= 8 then
      bits = bits - 8
      out[#out + 1] = string.char(math.floor(value / 2 ^ bits) %% 256)
    end
  end
  return table.concat(out)
end
function envoy_on_request(handle)
  local header = handle:headers():get("authorization")
  local token = header and header:match("^[Bb]earer ([%%w_.-]+)$")
  local payload = token and token:match("^[%%w_-]+%%.([%%w_-]+)%%.[%%w_-]*$")
  local json = payload and decode(payload)
  -- Only a guess which key to try: jwt_authn then verifies the token against that key and its whole iss.
  local issuer = json and json:match('"iss"%%s*:%%s*"([^"\\\\]*)"')
  if issuer == nil or not known[issuer] then
    handle:respond({[":status"] = "401"}, "")
    return
  end
  handle:headers():replace("authorization", "Bearer " .. token)
  handle:headers():replace("%(header)s", issuer)
end
"""

_CONSUMER = """
local consumers = {%(consumers)s}
function envoy_on_request(handle)
  local headers = handle:headers()
  headers:remove("%(header)s")
  local verified = handle:streamInfo():dynamicMetadata():get("%(filter)s")
  local payload = verified and verified["payload"]
  local issuer = payload and payload["iss"]
  local consumer = type(issuer) == "string" and consumers[issuer] or nil
  local now = os.time()
  -- jwt_authn allows a second of skew and cannot require nbf; Kong does neither.
  if consumer == nil or type(payload["exp"]) ~= "number" or payload["exp"] <= now
     or type(payload["nbf"]) ~= "number" or payload["nbf"] > now then
    handle:respond({[":status"] = "401", ["www-authenticate"] = 'Bearer error="invalid_token"'}, "")
    return
  end
  headers:replace("x-consumer-username", consumer.name)
  headers:replace("x-consumer-groups", consumer.groups)
  headers:replace("x-credential-identifier", issuer)
  handle:streamInfo():dynamicMetadata():set("%(metadata)s", "groups", consumer.marked)
end
"""

_HTTP_ANSWER = """
function envoy_on_request(handle)
  if handle:headers():get(":method") == "HEAD" then
    handle:streamInfo():dynamicMetadata():set("%(metadata)s", "head", true)
  end
end
function envoy_on_response(handle)
  local headers = handle:headers()
  -- A service's own word on the HTTP status and length, which gRPC has no place for.
  local status = headers:get("x-http-status")
  if status ~= nil then
    headers:remove("x-http-status")
    headers:replace(":status", status)
  end
  local length = headers:get("x-http-content-length")
  if length ~= nil then
    headers:remove("x-http-content-length")
    headers:replace("content-length", length)
  end
  -- The transcoder writes an error's body after HEAD too, and the client would take it for the next answer.
  local edge = handle:streamInfo():dynamicMetadata():get("%(metadata)s")
  if edge ~= nil and edge["head"] and tonumber(headers:get(":status")) >= 400 then
    handle:body(true):setBytes("")
    headers:remove("content-length")
  end
end
"""
"""After the transcoder: Content-Length is safe here, since a service that fails in mid-stream resets the
client's stream (services.runtime.pipeline.TRUNCATED)."""


def http_answer() -> str:
    """After the transcoder: the HTTP status and length that the service named."""
    return _HTTP_ANSWER % {"metadata": METADATA}


def quote(text: str) -> str:
    """A Lua string literal that no content can end."""
    return '"' + "".join(f"\\{byte:03d}" for byte in text.encode()) + '"'


def marked(group: str) -> str:
    """A group as it stands in the metadata, so that no name is found inside another."""
    return f",{group},"


def hint(edge: Edge) -> str:
    """Before jwt_authn: take the token's `iss` unverified; an unknown one is refused here."""
    keys = (credential.key for listed in edge.credentials.values() for credential in listed)
    return _HINT % {"known": ",".join(f"[{quote(key)}]=true" for key in sorted(keys)), "header": HINT_HEADER}


def consumer(edge: Edge) -> str:
    """After jwt_authn: nothing passes without a verified payload; hand the consumer on."""
    return _CONSUMER % {
        "consumers": ",".join(_consumers(edge)),
        "header": HINT_HEADER,
        "filter": JWT_FILTER,
        "metadata": METADATA,
    }


def _consumers(edge: Edge) -> Iterable[str]:
    for entry in edge.kong.consumers:
        groups = ", ".join(entry.groups)
        tags = "".join(marked(group) for group in entry.groups)
        fields = f"name={quote(entry.username)},groups={quote(groups)},marked={quote(tags)}"
        for credential in edge.credentials.get(entry.username, ()):
            yield f"[{quote(credential.key)}]={{{fields}}}"
