"""Programs of model cards on a machine without a GPU."""

import re


def on_cpu(program, folders=()):
    """The program in float32, without its lines for the GPU and for files, on `folders` instead of repositories.

    folders: {name after "your-name/": folder}.
    """
    program = program.replace('pipe.to("cuda")\n', "")
    program = re.sub(r"torch_dtype=(torch\.\w+|\{.*?\})", "torch_dtype=torch.float32", program)
    for name, folder in dict(folders).items():
        program = program.replace(f'"your-name/{name}"', repr(str(folder)))
    lines = program.splitlines()
    return "\n".join(line for line in lines if not line.startswith(("image.save(", "export_to_video(")))
