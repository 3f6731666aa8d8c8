"""JSON Schemas of proto messages, in the JSON that the transcoder reads and writes."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2

Json = dict[str, Any]
HTTP_BODY = ".google.api.HttpBody"

_Field = descriptor_pb2.FieldDescriptorProto
_INT32: Json = {"type": "integer", "format": "int32"}
_UINT32: Json = {"type": "integer", "minimum": 0}
# JSON numbers lose precision past 2^53, so 64-bit integers are texts.
_INT64: Json = {"type": "string", "format": "int64"}
_UINT64: Json = {"type": "string", "format": "uint64"}
_SCALARS: dict[int, Json] = {
    _Field.TYPE_DOUBLE: {"type": "number", "format": "double"},
    _Field.TYPE_FLOAT: {"type": "number", "format": "float"},
    _Field.TYPE_BOOL: {"type": "boolean"},
    _Field.TYPE_STRING: {"type": "string"},
    _Field.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    **dict.fromkeys((_Field.TYPE_INT32, _Field.TYPE_SINT32, _Field.TYPE_SFIXED32), _INT32),
    **dict.fromkeys((_Field.TYPE_UINT32, _Field.TYPE_FIXED32), _UINT32),
    **dict.fromkeys((_Field.TYPE_INT64, _Field.TYPE_SINT64, _Field.TYPE_SFIXED64), _INT64),
    **dict.fromkeys((_Field.TYPE_UINT64, _Field.TYPE_FIXED64), _UINT64),
}
_WELL_KNOWN: dict[str, Json] = {
    ".google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    ".google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"},
    ".google.protobuf.FieldMask": {"type": "string", "description": "Names of fields, with commas."},
    ".google.protobuf.Struct": {"type": "object"},
    ".google.protobuf.ListValue": {"type": "array", "items": {}},
    ".google.protobuf.Value": {},
    ".google.protobuf.Empty": {"type": "object"},
    ".google.protobuf.Any": {"type": "object", "properties": {"@type": {"type": "string"}}},
    ".google.protobuf.DoubleValue": {"type": ["number", "null"]},
    ".google.protobuf.FloatValue": {"type": ["number", "null"]},
    ".google.protobuf.BoolValue": {"type": ["boolean", "null"]},
    ".google.protobuf.StringValue": {"type": ["string", "null"]},
    ".google.protobuf.Int32Value": {"type": ["integer", "null"]},
    ".google.protobuf.UInt32Value": {"type": ["integer", "null"]},
    ".google.protobuf.Int64Value": {"type": ["string", "null"]},
    ".google.protobuf.UInt64Value": {"type": ["string", "null"]},
    HTTP_BODY: {"type": "string", "format": "binary"},
}
_ERROR: Json = {
    "type": "object",
    "description": "google.rpc.Status: what every refusal looks like.",
    "required": ["code", "message"],
    "properties": {
        "code": {"type": "integer", "description": "google.rpc.Code, such as 5 for NOT_FOUND."},
        "message": {"type": "string", "description": "One sentence for people."},
        "details": {
            "type": "array",
            "description": "google.rpc.ErrorInfo (reason, domain, metadata), BadRequest (fieldViolations), "
            "RetryInfo, RequestInfo.",
            "items": {"type": "object", "properties": {"@type": {"type": "string"}}, "required": ["@type"]},
        },
    },
}


class Schemas:
    """Looks messages up and collects the schemas that are referred to."""

    def __init__(self, descriptors: descriptor_pb2.FileDescriptorSet) -> None:
        """Index every message, enum and comment of the set."""
        self._comments: dict[tuple[str, tuple[int, ...]], str] = {}
        self._messages: dict[str, tuple[descriptor_pb2.DescriptorProto, str, tuple[int, ...]]] = {}
        self._enums: dict[str, tuple[descriptor_pb2.EnumDescriptorProto, str, tuple[int, ...]]] = {}
        self._used: dict[str, Json] = {}
        for file in descriptors.file:
            for location in file.source_code_info.location:
                text = "\n".join(line.strip() for line in location.leading_comments.strip().splitlines())
                if text:
                    self._comments[file.name, tuple(location.path)] = text
            prefix = f".{file.package}"
            for index, message in enumerate(file.message_type):
                self._index(prefix, message, file.name, (4, index))
            for index, enum in enumerate(file.enum_type):
                self._enums[f"{prefix}.{enum.name}"] = (enum, file.name, (5, index))

    def _index(
        self, prefix: str, message: descriptor_pb2.DescriptorProto, file: str, path: tuple[int, ...]
    ) -> None:
        full = f"{prefix}.{message.name}"
        self._messages[full] = (message, file, path)
        for index, nested in enumerate(message.nested_type):
            self._index(full, nested, file, (*path, 3, index))
        for index, enum in enumerate(message.enum_type):
            self._enums[f"{full}.{enum.name}"] = (enum, file, (*path, 4, index))

    def comment(self, file: str, path: tuple[int, ...]) -> str:
        """The comment before an element, or an empty text."""
        return self._comments.get((file, path), "")

    def collected(self) -> Json:
        """All schemas that were referred to, and the error."""
        return {"Error": _ERROR, **{name: self._used[name] for name in sorted(self._used)}}

    def answer(self, message: str, *, streamed: bool) -> Json:
        """Content of a successful answer."""
        if message == HTTP_BODY:
            return {"*/*": {"schema": _WELL_KNOWN[HTTP_BODY]}}
        kind = "text/event-stream" if streamed else "application/json"
        return {kind: {"schema": self._reference(message)}}

    def body(self, message: str, field: str, *, skip: set[str]) -> Json:
        """Content of a request: the whole message but the fields in the path, or one field."""
        if field == "*":
            if message == HTTP_BODY:
                return {"*/*": {"schema": _WELL_KNOWN[HTTP_BODY]}}
            if not skip:
                return {"application/json": {"schema": self._reference(message)}}
            schema = self._message(message)
            kept = {
                name: value for name, value in schema["properties"].items() if name not in _json_names(skip)
            }
            return {"application/json": {"schema": {**schema, "properties": kept}}}
        one = next(item for item in self._messages[message][0].field if item.name == field)
        if one.type_name == HTTP_BODY:
            return {"*/*": {"schema": _WELL_KNOWN[HTTP_BODY]}}
        return {"application/json": {"schema": self._field(one)}}

    def path_field(self, message: str, name: str) -> Json:
        """Schema of a field named by its path (`a.b`)."""
        head, _, tail = name.partition(".")
        one = next(item for item in self._messages[message][0].field if item.name == head)
        return self.path_field(one.type_name, tail) if tail else self._field(one)

    def query(self, message: str, *, skip: set[str], prefix: str = "") -> list[Json]:
        """Query parameters of the fields that neither path nor body carry; messages field by field."""
        found: list[Json] = []
        entry, file, path = self._messages[message]
        for index, one in enumerate(entry.field):
            name = f"{prefix}{one.name}"
            if name in skip or one.type_name == HTTP_BODY or self._is_map(one):
                continue
            nested = one.type == _Field.TYPE_MESSAGE and one.type_name not in _WELL_KNOWN
            if nested:
                if one.label != _Field.LABEL_REPEATED and not prefix:
                    found += self.query(one.type_name, skip=skip, prefix=f"{name}.")
                continue
            parameter: Json = {
                "name": ".".join(_json_name(part) for part in name.split(".")),
                "in": "query",
                "schema": self._field(one),
            }
            text = self.comment(file, (*path, 2, index))
            if text:
                parameter["description"] = text
            found.append(parameter)
        return found

    def _is_map(self, one: descriptor_pb2.FieldDescriptorProto) -> bool:
        return one.type_name in self._messages and self._messages[one.type_name][0].options.map_entry

    def _reference(self, message: str) -> Json:
        if message in _WELL_KNOWN:
            return dict(_WELL_KNOWN[message])
        name = _schema_name(message)
        if name not in self._used:
            self._used[name] = {}  # a message may contain itself
            self._used[name] = self._message(message)
        return {"$ref": f"#/components/schemas/{name}"}

    def _message(self, message: str) -> Json:
        entry, file, path = self._messages[message]
        properties: Json = {}
        for index, one in enumerate(entry.field):
            schema = self._field(one)
            text = self.comment(file, (*path, 2, index))
            if text:
                schema = {**schema, "description": text}
            properties[_json_name(one.name)] = schema
        text = self.comment(file, path)
        return {"type": "object", **({"description": text} if text else {}), "properties": properties}

    def _field(self, one: descriptor_pb2.FieldDescriptorProto) -> Json:
        if self._is_map(one):
            value = self._messages[one.type_name][0].field[1]
            return {"type": "object", "additionalProperties": self._field(value)}
        if one.type == _Field.TYPE_MESSAGE:
            schema = self._reference(one.type_name)
        elif one.type == _Field.TYPE_ENUM:
            schema = self._enum(one.type_name)
        else:
            schema = dict(_SCALARS[one.type])
        if one.label == _Field.LABEL_REPEATED:
            return {"type": "array", "items": schema}
        return schema

    def _enum(self, full: str) -> Json:
        name = _schema_name(full)
        if name not in self._used:
            enum, file, path = self._enums[full]
            lines = [self.comment(file, path)]
            for index, value in enumerate(enum.value):
                text = " ".join(self.comment(file, (*path, 2, index)).split())
                lines.append(f"- `{value.name}`: {text}" if text else f"- `{value.name}`")
            self._used[name] = {
                "type": "string",
                "description": "\n".join(line for line in lines if line),
                "enum": [value.name for value in enum.value],
            }
        return {"$ref": f"#/components/schemas/{name}"}


def _schema_name(full: str) -> str:
    """`vectors.Collection` for `.plexus.vectors.v1.Collection`: unique over the areas, and short."""
    return full.removeprefix(".plexus.").removeprefix(".").replace(".v1.", ".")


def _json_name(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in rest)


def _json_names(names: set[str]) -> set[str]:
    return {_json_name(name) for name in names}
