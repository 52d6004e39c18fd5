"""Translates a module of PTX to C++ files: python translate.py IN.ptx FOLDER NAME CHUNK_BYTES."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from instructions import Operation, identifier, label, register
from ptx import Instruction, Kernel, Label, Module, PtxError, Variable, parse

GAP = 128  # bytes between shared variables, for an access past the end of one to miss the next


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def symbol(module: str, variable: Variable) -> str:
    return f"variable_{module}_{identifier(variable.name)}"


class KernelWriter:
    """The C++ function of one kernel, with its table of sites and its layout of shared memory."""

    def __init__(self, kernel: Kernel, index: int, module: str, variables: list[Variable]) -> None:
        self.kernel = kernel
        self.index = index
        self.module = module
        self.locals = [variable for variable in kernel.variables if variable.space == "local"]
        self.addresses = {v.name: f"address({register(v.name)})" for v in self.locals}
        self.addresses |= {v.name: f"address({symbol(module, v)})" for v in variables if v.space != "shared"}
        self.sites: list[tuple[str, int, str]] = []
        self.lay_out_shared([v for v in variables if v.space == "shared"])

    def lay_out_shared(self, of_module: list[Variable]) -> None:
        used = {name for item in self.kernel.body if isinstance(item, Instruction) for name in names_in(item)}
        own = [v for v in self.kernel.variables if v.space == "shared"]
        fixed = own + [v for v in of_module if v.name in used and v.size is not None]
        self.shared: dict[str, int] = {}
        self.shared_bytes: list[tuple[str, int, int]] = []
        self.static_shared = end = 0
        for variable in fixed:
            size = variable.size or 0
            alignment = variable.alignment
            self.static_shared = -(-self.static_shared // alignment) * alignment + size
            self.shared[variable.name] = end
            self.shared_bytes.append((variable.name, end, size))
            end = -(-(end + size + GAP) // GAP) * GAP
        self.dynamic_offset = end
        for variable in of_module:
            if variable.size is None:
                self.shared[variable.name] = self.dynamic_offset

    @property
    def name(self) -> str:
        return f"kernel_{self.module}_{self.index}"

    def add_site(self, instruction: Instruction) -> str:
        self.sites.append((instruction.file, instruction.line, instruction.text))
        return f"sites_{self.index}[{len(self.sites) - 1}]"

    def text(self) -> str:
        body = []
        place = None
        for name, instructions in straight_runs(self.kernel.body):
            body.append(f"{label(name)}:;" if name else "")
            body.append(f"  EXECUTED({len(instructions)});")
            for item in instructions:
                if (item.file, item.line) != place:
                    place = (item.file, item.line)
                    body.append(f"#line {item.line} {quoted(item.file)}")
                body.append(self.instruction(item))
        declared = [f"  {self.declaration(name, bits)}" for name, bits in self.kernel.registers.items()]
        stack = [f"  alignas({max(v.alignment, 16)}) char {register(v.name)}[{v.size}];" for v in self.locals]
        head = f"void {self.name}(void** arguments) {{\n  const auto& at = *emulator::current;"
        return "\n".join([*self.site_table(), head, *declared, *stack, *body, "}\n"])

    def site_table(self) -> list[str]:
        name = f"name_{self.index}"
        used = dict.fromkeys(file for file, _, _ in self.sites)
        files = {file: f"file_{self.index}_{n}" for n, file in enumerate(used)}
        texts = {self.kernel.name: name} | files
        return [
            f'#line 1 "{self.name}"',
            *(f"constexpr char {symbol}[] = {quoted(text)};" for text, symbol in texts.items()),
            f"Site sites_{self.index}[] = {{",
            *(f"  {{{name}, {files[file]}, {line}, {quoted(text)}}}," for file, line, text in self.sites),
            "  {}",
            "};",
        ]

    @staticmethod
    def declaration(name: str, bits: int) -> str:
        return (
            f"bool {register(name)} = false;" if bits == 1 else f"u{bits} {register(name)} = u{bits}(kJunk);"
        )

    def instruction(self, instruction: Instruction) -> str:
        try:
            operation = Operation(self, instruction)
            code = operation.translate()
        except PtxError as error:
            place = f"{instruction.file}:{instruction.line}"
            raise PtxError(f"{place}: {error} in `{instruction.text}` of {self.kernel.name}") from None
        if instruction.guard:
            negated = "!" if instruction.guard.startswith("!") else ""
            code = f"if ({negated}{register(instruction.guard.lstrip('!'))}) {{ {code} }}"
        return f"  {{ {code} }}"


def straight_runs(body: list[Instruction | Label]) -> list[tuple[str, list[Instruction]]]:
    """Instructions that are executed all or none of them, and the label before the first ("": none)."""
    runs: list[tuple[str, list[Instruction]]] = [("", [])]
    for item in body:
        if isinstance(item, Label):
            runs.append((item.name, []))
            continue
        runs[-1][1].append(item)
        if item.opcode.split(".")[0] in ("bra", "brx", "ret", "exit"):
            runs.append(("", []))
    return [(name, instructions) for name, instructions in runs if name or instructions]


def names_in(instruction: Instruction) -> list[str]:
    return re.findall(r"[\w$]+", " ".join(instruction.operands))


# The C++ files of a module


def chunks_of(functions: list[str], limit: int) -> list[list[str]]:
    """Shares functions out to files of about `limit` bytes, in order."""
    chunks: list[list[str]] = [[]]
    size = 0
    for function in functions:
        if chunks[-1] and size + len(function) > limit:
            chunks.append([])
            size = 0
        chunks[-1].append(function)
        size += len(function)
    return chunks


def variable_definitions(module: Module, name: str) -> tuple[str, str, str]:
    """Declarations, definitions and table rows of the module's variables."""
    declarations, definitions, rows = [], [], []
    for variable in module.variables:
        if variable.space == "shared":
            continue
        own = symbol(name, variable)
        size = max(variable.size or 0, 1)
        initial = f" = {{{', '.join(map(str, variable.initial))}}}" if variable.initial else ""
        declarations.append(f"extern u8 {own}[];\n")
        definitions.append(f"alignas({max(variable.alignment, 16)}) u8 {own}[{size}]{initial};\n")
        rows.append(f"  {{{quoted(variable.name)}, {own}, {size}}},\n")
    return "".join(declarations), "".join(definitions), "".join(rows)


def kernel_row(writer: KernelWriter) -> tuple[str, str]:
    """The kernel's shared variables and its entry in the table."""
    shared = "".join(f"  {{{quoted(n)}, {offset}, {size}}},\n" for n, offset, size in writer.shared_bytes)
    variables = f"const emulator::SharedVariable shared_{writer.index}[] = {{\n{shared}  {{}}\n}};\n"
    kernel = writer.kernel
    members = [
        quoted(kernel.name),
        writer.name,
        f"shared_{writer.index}",
        len(writer.shared_bytes),
        writer.static_shared,
        writer.dynamic_offset,
        kernel.max_threads,
        kernel.cluster_size,
        f"sites_{writer.index}",
        len(writer.sites),
    ]
    return variables, f"  {{{', '.join(map(str, members))}}},\n"


def translate(text: str, name: str, chunk_bytes: int) -> dict[str, str]:
    """C++ files by name. `cuda_module_<name>` is what the host code calls to register the module."""
    module = parse(text)
    writers = [
        KernelWriter(kernel, index, name, module.variables) for index, kernel in enumerate(module.kernels)
    ]
    functions = [writer.text() for writer in writers]
    declarations, definitions, variable_rows = variable_definitions(module, name)
    # Inside ptx, whose functions then hide those of the C library with the same names.
    head = f'#include "ptx.h"\n\nnamespace ptx::module_{name} {{\n\n{declarations}\n'
    tail = f"}} // namespace ptx::module_{name}\n"
    files = {
        f"kernels{index}.cpp": head + "\n".join(chunk) + tail
        for index, chunk in enumerate(chunks_of(functions, chunk_bytes))
    }
    kernels = [kernel_row(writer) for writer in writers]
    of_kernels = "".join(f"void {w.name}(void**);\nextern Site sites_{w.index}[];\n" for w in writers)
    files["module.cpp"] = (
        f"{head}{definitions}\n{of_kernels}\n{''.join(shared for shared, _ in kernels)}\n"
        f"const emulator::Kernel kernels[] = {{\n{''.join(row for _, row in kernels)}  {{}}\n}};\n\n"
        f"const emulator::Variable variables[] = {{\n{variable_rows}  {{}}\n}};\n\n"
        f"emulator::Module module = {{kernels, variables, nullptr}};\n\n{tail}\n"
        f'extern "C" void** cuda_module_{name}(void*) {{\n'
        f"  emulator::add_module(ptx::module_{name}::module);\n"
        f"  return (void**)&ptx::module_{name}::module;\n}}\n"
    )
    return files


def main() -> None:
    source, folder, name, chunk_bytes = sys.argv[1:]
    try:
        files = translate(Path(source).read_text(), name, int(chunk_bytes))
    except PtxError as error:
        sys.exit(f"cuda_emulator: {error}")
    for file, text in files.items():
        (Path(folder) / file).write_text(text)


if __name__ == "__main__":
    main()
