import java.io.ByteArrayOutputStream;
import java.io.File;
import java.io.PrintStream;
import java.nio.file.Files;
import java.nio.file.Path;
import javax.tools.ToolProvider;

/** Compiles every program under in/ to out/ in one warm virtual machine, or runs a compiled Kotlin script. */
public class Batch {
    public static void main(String[] arguments) throws Throwable {
        if (arguments[0].equals("script")) {
            try {
                Class.forName(arguments[1]).getConstructor(String[].class).newInstance((Object) new String[0]);
            } catch (java.lang.reflect.InvocationTargetException error) {
                throw error.getCause();
            }
            return;
        }
        for (File program : new File("in").listFiles()) {
            String out = "out/" + program.getName();
            new File(out).mkdirs();
            ByteArrayOutputStream messages = new ByteArrayOutputStream();
            boolean built = arguments[0].equals("java") ? java(messages, program + "/main.java", out)
                                                    : kotlin(messages, program + "/main.kts", out, arguments[1]);
            if (!built) Files.write(Path.of(out, "errors"), messages.toByteArray());
        }
    }

    static boolean java(ByteArrayOutputStream messages, String source, String out) {
        return ToolProvider.getSystemJavaCompiler().run(null, messages, messages, "-nowarn", "-proc:none", "-d", out, source) == 0;
    }

    static boolean kotlin(ByteArrayOutputStream messages, String source, String out, String home) throws Exception {
        Class<?> compiler = Class.forName("org.jetbrains.kotlin.cli.jvm.K2JVMCompiler");
        String[] options = {"-kotlin-home", home, "-no-reflect", "-nowarn", "-Xallow-any-scripts-in-source-roots",
                            "-d", out, source};
        Object code = compiler.getMethod("exec", PrintStream.class, String[].class)
            .invoke(compiler.getConstructor().newInstance(), new PrintStream(messages), options);
        return code.toString().equals("OK");
    }
}
