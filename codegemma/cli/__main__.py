from codegemma.cli.main import main

main()
