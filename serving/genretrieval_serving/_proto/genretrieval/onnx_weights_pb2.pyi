from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Model(_message.Message):
    __slots__ = ("graph",)
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    graph: Graph
    def __init__(self, graph: _Optional[_Union[Graph, _Mapping]] = ...) -> None: ...

class Graph(_message.Message):
    __slots__ = ("initializer",)
    INITIALIZER_FIELD_NUMBER: _ClassVar[int]
    initializer: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, initializer: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("data_type",)
    class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNDEFINED: _ClassVar[Tensor.DataType]
        FLOAT: _ClassVar[Tensor.DataType]
        FLOAT16: _ClassVar[Tensor.DataType]
        BFLOAT16: _ClassVar[Tensor.DataType]
    UNDEFINED: Tensor.DataType
    FLOAT: Tensor.DataType
    FLOAT16: Tensor.DataType
    BFLOAT16: Tensor.DataType
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    data_type: Tensor.DataType
    def __init__(self, data_type: _Optional[_Union[Tensor.DataType, str]] = ...) -> None: ...
