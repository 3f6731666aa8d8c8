import static io.grpc.CallOptions.DEFAULT;
import static io.grpc.MethodDescriptor.MethodType.UNARY;

import com.google.gson.Gson;
import io.grpc.ClientCall;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.xds.XdsChannelCredentials;
import java.io.BufferedReader;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.UncheckedIOException;
import java.util.Base64;
import java.util.Map;
import java.util.Objects;
import java.util.concurrent.TimeUnit;

/**
 * A client of the mesh in Java, run by the tests beside it under {@code plexus join}: calls the method named by
 * each line of stdin, at once, and prints a JSON line for each.
 */
final class Caller {
  private static final long TIMEOUT_SECONDS = 60;

  private static final MethodDescriptor.Marshaller<byte[]> BYTES =
      new MethodDescriptor.Marshaller<>() {
        @Override
        public InputStream stream(byte[] message) {
          return new ByteArrayInputStream(message);
        }

        @Override
        public byte[] parse(InputStream stream) {
          try {
            return stream.readAllBytes();
          } catch (IOException error) {
            throw new UncheckedIOException(error);
          }
        }
      };

  public static void main(String[] arguments) throws Exception {
    ManagedChannel channel =
        Grpc.newChannelBuilder(
                arguments[0], XdsChannelCredentials.create(InsecureChannelCredentials.create()))
            .build();
    BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
    for (String line; (line = lines.readLine()) != null; ) {
      call(channel, line);
    }
    channel.shutdownNow();
  }

  private static void call(ManagedChannel channel, String name) {
    MethodDescriptor<byte[], byte[]> method =
        MethodDescriptor.newBuilder(BYTES, BYTES).setType(UNARY).setFullMethodName(name.substring(1)).build();
    ClientCall<byte[], byte[]> call =
        channel.newCall(method, DEFAULT.withDeadlineAfter(TIMEOUT_SECONDS, TimeUnit.SECONDS));
    call.start(
        new ClientCall.Listener<>() {
          private byte[] body = {};

          @Override
          public void onMessage(byte[] message) {
            body = message;
          }

          @Override
          public void onClose(Status status, Metadata trailers) {
            Object peer = call.getAttributes().get(Grpc.TRANSPORT_ATTR_REMOTE_ADDR);
            say(
                Map.of(
                    "code", status.getCode().name(),
                    "peer", Objects.toString(peer, ""),
                    "body", Base64.getEncoder().encodeToString(body),
                    "text", Objects.toString(status.getDescription(), "")));
          }
        },
        new Metadata());
    call.sendMessage(new byte[0]);
    call.halfClose();
    call.request(1);
  }

  private static synchronized void say(Map<String, String> answer) {
    System.out.println(new Gson().toJson(answer));
  }
}
