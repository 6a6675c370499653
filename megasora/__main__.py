from megasora.cli import console

console()
