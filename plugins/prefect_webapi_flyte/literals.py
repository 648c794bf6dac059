"""Values of Python as Flyte's literals, and back."""

from datetime import UTC, datetime, timedelta
from typing import Any, cast

from flyteidl.core.interface_pb2 import Variable, VariableMap
from flyteidl.core.literals_pb2 import (
    Literal,
    LiteralCollection,
    LiteralMap,
    Primitive,
    Scalar,
    StructuredDatasetMetadata,
    Void,
)
from flyteidl.core.literals_pb2 import StructuredDataset as DatasetLiteral
from flyteidl.core.types_pb2 import LiteralType, StructuredDatasetType

from prefect_webapi_flyte.models import StructuredDataset

__all__ = ["literal_map", "python_of", "variables"]


def literal_map(values: dict[str, Any]) -> LiteralMap:
    return LiteralMap(literals={name: _literal(value) for name, value in values.items()})


def _literal(value: Any) -> Literal:
    match value:
        case None:
            return Literal(scalar=Scalar(none_type=Void()))
        case list():
            return Literal(
                collection=LiteralCollection(literals=map(_literal, cast(list[Any], value)))
            )
        case dict():
            return Literal(map=literal_map(cast(dict[str, Any], value)))
        case StructuredDataset(uri=uri, format=form):
            kind = StructuredDatasetMetadata(
                structured_dataset_type=StructuredDatasetType(format=form)
            )
            return Literal(scalar=Scalar(structured_dataset=DatasetLiteral(uri=uri, metadata=kind)))
        case _:
            return Literal(scalar=Scalar(primitive=_primitive(value)))


def _primitive(value: Any) -> Primitive:
    match value:
        case bool():
            return Primitive(boolean=value)
        case int():
            return Primitive(integer=value)
        case float():
            return Primitive(float_value=value)
        case datetime():
            primitive = Primitive()
            primitive.datetime.FromDatetime(value)
            return primitive
        case timedelta():
            primitive = Primitive()
            primitive.duration.FromTimedelta(value)
            return primitive
        case _:
            return Primitive(string_value=value)


def python_of(literal: Literal) -> Any:
    """The value of a literal.

    Raises:
        ValueError: a literal that has no value here; says which.
    """
    match kind := literal.WhichOneof("value"):
        case "collection":
            return [python_of(each) for each in literal.collection.literals]
        case "map":
            return {name: python_of(each) for name, each in literal.map.literals.items()}
        case "scalar":
            return _python_of_scalar(literal.scalar)
        case _:
            raise ValueError(f"is {_named(kind)}")


def _python_of_scalar(scalar: Scalar) -> Any:
    match kind := scalar.WhichOneof("value"):
        case "none_type":
            return None
        case "structured_dataset":
            dataset = scalar.structured_dataset
            form = dataset.metadata.structured_dataset_type.format
            return StructuredDataset(uri=dataset.uri, format=form)
        case "primitive":
            primitive = scalar.primitive
            match kind := primitive.WhichOneof("value"):
                case "datetime":
                    return primitive.datetime.ToDatetime(tzinfo=UTC)
                case "duration":
                    return primitive.duration.ToTimedelta()
                case None:
                    raise ValueError(f"is {_named(kind)}")
                case _:
                    return getattr(primitive, kind)
        case _:
            raise ValueError(f"is {_named(kind)}")


def _named(kind: str | None) -> str:
    named = f"a literal of kind {kind}" if kind else "an empty literal"
    return f"{named}, which has no value in Python here"


def variables(types: dict[str, str]) -> VariableMap:
    """Declarations from types in words."""
    return VariableMap(
        variables={name: Variable(type=_literal_type(kind)) for name, kind in types.items()}
    )


def _literal_type(name: str) -> LiteralType:
    collection, _, inner = name.removesuffix("]").partition("[")
    match collection:
        case "list":
            return LiteralType(collection_type=_literal_type(inner))
        case "map":
            return LiteralType(map_value_type=_literal_type(inner))
        case "structured_dataset":
            return LiteralType(structured_dataset_type=StructuredDatasetType())
        case _:
            return LiteralType(simple=name.upper())
