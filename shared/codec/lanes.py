"""Sixteen uint32 side by side, as a type of Numba's: what lets the entropy coder step sixteen states at once.

Numba has no vector type, and LLVM does not find the vectors of a rANS loop by itself (table look-ups, words that only
some lanes take in). So the few operations the coder needs are given here as LLVM IR on <16 x i32>, which any target
compiles, into one register or four as the processor has them. Only `spread` and `squeeze` have a second form, for
AVX-512, where each is an instruction; both forms compute the same.

In a kernel, `+ - * & | << >> < >= ==` work on lanes (unsigned, modulo 2^32) and on lanes with an integer. Memory is
addressed as an integer (`array.ctypes.data`) and a position that counts elements; arrays themselves would have their
references counted at each inlined call, which costs more than the work done. Nothing is bounds-checked: the callers in
`shared.codec.kernels` say why each access is inside.

Look-ups are scalar loads put together, not gather instructions: 1.2 against 1.5 ns a symbol on a Zen 4.
"""

# mypy: ignore-errors
# (IR builders: values of llvmlite and types of Numba, neither of which mypy knows.)

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

WIDTH = 16

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_LANES = ir.VectorType(_I32, WIDTH)
_MASK = ir.VectorType(_I1, WIDTH)
_WIDE = ir.VectorType(_I64, WIDTH)


class _LanesType(types.Type):
    def __init__(self):
        super().__init__("sightline_lanes")


class _MaskType(types.Type):
    def __init__(self):
        super().__init__("sightline_mask")


_lanes, _mask = _LanesType(), _MaskType()
_pair = types.UniTuple(_lanes, 2)


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, _LANES)


@register_model(_MaskType)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, _MASK)


# -- operators ---------------------------------------------------------------------------------------------------------


def _add_operator(symbol, result, build):
    @type_callable(symbol)
    def _type(_context):
        def typer(a, b):
            return result if a is _lanes and (b is _lanes or isinstance(b, types.Integer)) else None

        return typer

    @lower_builtin(symbol, _LanesType, _LanesType)
    def _lower(_context, builder, _signature, arguments):
        return build(builder, *arguments)

    @lower_builtin(symbol, _LanesType, types.Integer)
    def _lower_with_integer(_context, builder, _signature, arguments):
        return build(builder, arguments[0], _repeat(builder, arguments[1]))


def _repeat(builder, integer):
    """The integer modulo 2^32 in every lane."""
    if integer.type.width > 32:
        integer = builder.trunc(integer, _I32)
    elif integer.type.width < 32:
        integer = builder.zext(integer, _I32)
    first = builder.insert_element(ir.Constant(_LANES, ir.Undefined), integer, _I32(0))
    return builder.shuffle_vector(first, ir.Constant(_LANES, ir.Undefined), _constant([0] * WIDTH))


def _constant(values):
    return ir.Constant(ir.VectorType(_I32, len(values)), values)


for _symbol, _name in (
    (operator.add, "add"),
    (operator.sub, "sub"),
    (operator.mul, "mul"),
    (operator.and_, "and_"),
    (operator.or_, "or_"),
    (operator.lshift, "shl"),
    (operator.rshift, "lshr"),
):
    _add_operator(_symbol, _lanes, lambda builder, a, b, name=_name: getattr(builder, name)(a, b))
for _symbol, _name in ((operator.lt, "<"), (operator.ge, ">="), (operator.eq, "==")):
    _add_operator(_symbol, _mask, lambda builder, a, b, name=_name: builder.icmp_unsigned(name, a, b))


# -- arithmetic --------------------------------------------------------------------------------------------------------


@intrinsic
def choose(_typing, condition, a, b):
    """`a` in the lanes of `condition`, else `b`."""

    def build(_context, builder, _signature, arguments):
        return builder.select(*arguments)

    return _lanes(_mask, _lanes, _lanes), build


@intrinsic
def signed_shift(_typing, a, bits):
    """Lanes as int32, shifted right by `bits`."""

    def build(_context, builder, _signature, arguments):
        return builder.ashr(arguments[0], _repeat(builder, arguments[1]))

    return _lanes(_lanes, bits), build


@intrinsic
def multiply_shift(_typing, a, b, bits):
    """Low 32 bits of (a * b) >> bits, the product 64 bits wide."""

    def build(_context, builder, _signature, arguments):
        a, b, bits = (builder.zext(argument, _WIDE) for argument in arguments)
        return builder.trunc(builder.lshr(builder.mul(a, b), bits), _LANES)

    return _lanes(_lanes, _lanes, _lanes), build


@intrinsic
def count(_typing, condition):
    """How many lanes `condition` holds in, as uint64."""

    def build(_context, builder, _signature, arguments):
        return builder.zext(builder.ctpop(builder.bitcast(arguments[0], _I16)), _I64)

    return types.uint64(_mask), build


@intrinsic
def anywhere(_typing, condition):
    """Whether `condition` holds in any lane."""

    def build(_context, builder, _signature, arguments):
        return builder.icmp_unsigned("!=", builder.bitcast(arguments[0], _I16), _I16(0))

    return types.boolean(_mask), build


@intrinsic
def both(_typing, a, b):
    """The condition that holds where `a` and `b` do."""

    def build(_context, builder, _signature, arguments):
        return builder.and_(*arguments)

    return _mask(_mask, _mask), build


@intrinsic
def last_lanes(_typing, number):
    """The condition that holds in the last `number` lanes, 0 to 16."""

    def build(_context, builder, _signature, arguments):
        ones = builder.shl(_I32(0xFFFF0000), builder.sub(_I32(WIDTH), builder.trunc(arguments[0], _I32)))
        return builder.bitcast(builder.trunc(builder.lshr(ones, _I32(WIDTH)), _I16), _MASK)

    return _mask(types.uint64), build


# -- memory ------------------------------------------------------------------------------------------------------------


def _element(builder, address, position, bits):
    return builder.gep(builder.inttoptr(address, ir.IntType(bits).as_pointer()), [position])


def _loader(bits):
    @intrinsic
    def load(_typing, address, position):
        def build(_context, builder, _signature, arguments):
            source = _element(builder, *arguments, bits)
            vector = builder.load(builder.bitcast(source, ir.VectorType(ir.IntType(bits), WIDTH).as_pointer()))
            vector.align = bits // 8
            return vector if bits == 32 else builder.zext(vector, _LANES)

        return _lanes(types.uint64, types.uint64), build

    return load


def _storer(bits):
    @intrinsic
    def store(_typing, address, position, values):
        def build(context, builder, _signature, arguments):
            address, position, values = arguments
            target_type = ir.VectorType(ir.IntType(bits), WIDTH)
            target = builder.bitcast(_element(builder, address, position, bits), target_type.as_pointer())
            builder.store(values if bits == 32 else builder.trunc(values, target_type), target).align = bits // 8
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64, _lanes), build

    return store


load_u8, load_u16, load_u32 = _loader(8), _loader(16), _loader(32)  # 16 elements from `position` on
store_u8, store_u16, store_u32 = _storer(8), _storer(16), _storer(32)


@intrinsic
def look_up(_typing, address, positions):
    """Low and high halves of the uint64 at each lane's position."""

    def build(context, builder, _signature, arguments):
        address, positions = arguments
        # Two positions leave the vector register at a time.
        pairs = builder.bitcast(positions, ir.VectorType(_I64, WIDTH // 2))
        elements = []
        for k in range(WIDTH // 2):
            pair = builder.extract_element(pairs, _I32(k))
            elements += [builder.and_(pair, _I64(0xFFFFFFFF)), builder.lshr(pair, _I64(32))]
        return _collect(context, builder, address, elements)

    return _pair(types.uint64, _lanes), build


@intrinsic
def look_up_by_bytes(_typing, address, positions_address, position):
    """`look_up` at the 16 uint8 from `position` on: they need not pass a vector register."""

    def build(context, builder, _signature, arguments):
        address, positions_address, position = arguments
        first = _element(builder, positions_address, position, 8)
        elements = [builder.zext(builder.load(builder.gep(first, [_I64(k)])), _I64) for k in range(WIDTH)]
        return _collect(context, builder, address, elements)

    return _pair(types.uint64, types.uint64, types.uint64), build


def _collect(context, builder, address, positions):
    halves = []
    for half in (positions[: WIDTH // 2], positions[WIDTH // 2 :]):
        vector = ir.Constant(ir.VectorType(_I64, WIDTH // 2), ir.Undefined)
        for k, position in enumerate(half):
            vector = builder.insert_element(vector, builder.load(_element(builder, address, position, 64)), _I32(k))
        halves.append(builder.bitcast(vector, _LANES))
    low, high = (builder.shuffle_vector(*halves, _constant(list(range(k, 2 * WIDTH, 2)))) for k in (0, 1))
    return context.make_tuple(builder, _pair, [low, high])


# -- moving between lanes ----------------------------------------------------------------------------------------------


@intrinsic
def spread(_typing, condition, values):
    """The first lanes of `values`, in order, into the lanes of `condition`; 0 elsewhere."""

    def build(context, builder, _signature, arguments):
        if _has_avx512(context):
            return _avx512(builder, "expand", *arguments)
        condition, values = arguments
        memory, position, result = _spill(builder, values), _I32(0), ir.Constant(_LANES, [0] * WIDTH)
        for k in range(WIDTH):
            bit = builder.extract_element(condition, _I32(k))
            value = builder.load(builder.gep(memory, [position]))
            result = builder.insert_element(result, builder.select(bit, value, _I32(0)), _I32(k))
            position = builder.add(position, builder.zext(bit, _I32))
        return result

    return _lanes(_mask, _lanes), build


@intrinsic
def squeeze(_typing, condition, values):
    """The lanes of `condition`, in order, into the first lanes; what follows them is not defined."""

    def build(context, builder, _signature, arguments):
        if _has_avx512(context):
            return _avx512(builder, "compress", *arguments)
        condition, values = arguments
        memory, position = _spill(builder, values), _I32(0)
        for k in range(WIDTH):
            # Writing at position <= k leaves what is still to be moved as it is.
            builder.store(builder.extract_element(values, _I32(k)), builder.gep(memory, [position]))
            position = builder.add(position, builder.zext(builder.extract_element(condition, _I32(k)), _I32))
        return builder.load(builder.bitcast(memory, _LANES.as_pointer()))

    return _lanes(_mask, _lanes), build


def _spill(builder, values):
    memory = cgutils.alloca_once(builder, _LANES)
    builder.store(values, memory)
    return builder.bitcast(memory, _I32.as_pointer())


def _has_avx512(context):
    # The target Numba compiles for, not the processor it runs on: NUMBA_CPU_NAME may name an older one.
    return "+avx512f" in context.codegen().magic_tuple()[2].split(",")


def _avx512(builder, name, condition, values):
    function_type = ir.FunctionType(_LANES, [_LANES, _LANES, _MASK])
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.x86.avx512.mask.{name}.v16i32")
    return builder.call(function, [values, ir.Constant(_LANES, [0] * WIDTH), condition])
