import java.nio.charset.StandardCharsets;
import java.time.Instant;
import java.util.Map;
import java.util.Properties;
import java.util.UUID;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.serialization.StringSerializer;

/** Sends one settled purchase: java Purchase.java servers merchant user product amount currency. */
public class Purchase {
    public static void main(String[] args) throws Exception {
        String servers = args[0], merchant = args[1], user = args[2], product = args[3], amount = args[4], currency = args[5];
        // The provider's transaction id: one purchase, however often it is sent.
        String payment = "pay-" + UUID.randomUUID();
        String now = Instant.now().toString();
        String payload = """
            {"user_id": "%s", "external_ref": "%s", "product_code": "%s", "payment_method": "card",
             "order_placed_at": "%s", "settled_at": "%s",
             "pricing_snapshot": {"country": "AM", "amount": "%s", "currency": "%s"}}
            """.formatted(user, payment, product, now, now, amount, currency);
        Properties settings = new Properties();
        settings.put("bootstrap.servers", servers);
        settings.put("acks", "all");
        settings.put("enable.idempotence", "true");
        try (var producer = new KafkaProducer<>(settings, new StringSerializer(), new StringSerializer())) {
            var record = new ProducerRecord<>("credits." + merchant + ".purchases", user, payload);
            Map.of("ce_specversion", "1.0", "ce_id", "settled-" + payment, "ce_source", "/my-shop",
                    "ce_type", "Purchase.Settled", "ce_time", now, "content-type", "application/json")
                .forEach((name, value) -> record.headers().add(name, value.getBytes(StandardCharsets.UTF_8)));
            producer.send(record).get();
            System.out.println("settled-" + payment);
        }
    }
}
