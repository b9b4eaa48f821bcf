// An application on Postgres' JDBC driver with its defaults: argv is host, port, user and the application's name.

import java.sql.Array;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Savepoint;
import java.sql.Statement;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;
import org.postgresql.copy.CopyManager;

public class AppJdbc {
    private static String me;

    public static void main(String[] words) throws Exception {
        me = words[3];
        String url = "jdbc:postgresql://" + words[0] + ":" + words[1] + "/" + words[2];
        try (Connection connection = DriverManager.getConnection(url, words[2], "")) {
            try (Statement statement = connection.createStatement()) {
                statement.execute("SET TIME ZONE '" + (me.equals("one") ? "Asia/Kolkata" : "Europe/Paris") + "'");
                statement.execute("DROP SCHEMA IF EXISTS jdbc_" + me + " CASCADE; CREATE SCHEMA jdbc_" + me);
            }
            connection.setSchema("jdbc_" + me);
            prepares(connection);
            reads(connection);
            recovers(connection);
            copies(connection);
            listens(connection);
            connection.createStatement().execute("DROP SCHEMA jdbc_" + me + " CASCADE");
        }
        System.out.println("ok");
    }

    private static void check(boolean holds, Object what) {
        if (!holds) throw new AssertionError(what);
    }

    private static String one(Connection connection, String text) throws SQLException {
        try (Statement statement = connection.createStatement(); ResultSet rows = statement.executeQuery(text)) {
            check(rows.next(), text);
            return rows.getString(1);
        }
    }

    /** The driver names a statement when it comes for the fifth time; batches; generated keys; arrays. */
    private static void prepares(Connection connection) throws SQLException {
        connection.createStatement().execute("CREATE TABLE items (id serial PRIMARY KEY, v text, n int)");
        String insert = "INSERT INTO items (v, n) VALUES (?, ?)";
        try (PreparedStatement prepared = connection.prepareStatement(insert, Statement.RETURN_GENERATED_KEYS)) {
            for (int n = 1; n <= 30; n++) {
                prepared.setString(1, me);
                prepared.setInt(2, n);
                check(prepared.executeUpdate() == 1, n);
                try (ResultSet keys = prepared.getGeneratedKeys()) {
                    check(keys.next() && keys.getInt("id") == n, n);
                }
                check(one(connection, "SHOW search_path").equals("jdbc_" + me), one(connection, "SHOW search_path"));
            }
        }
        try (PreparedStatement batch = connection.prepareStatement(insert)) {
            for (int n = 31; n <= 300; n++) {
                batch.setString(1, me);
                batch.setInt(2, n);
                batch.addBatch();
            }
            check(batch.executeBatch().length == 270, "batch");
        }
        for (int n = 1; n < 40; n++) {
            String marks = "?, ".repeat(n - 1) + "?";
            try (PreparedStatement in = connection.prepareStatement("SELECT id FROM items WHERE id IN (" + marks + ")")) {
                for (int i = 1; i <= n; i++) in.setInt(i, i);
                ResultSet rows = in.executeQuery();
                int found = 0;
                while (rows.next()) found++;
                check(found == n, found);
            }
        }
        try (PreparedStatement any = connection.prepareStatement("SELECT count(*) FROM items WHERE n = ANY (?)")) {
            Array numbers = connection.createArrayOf("int4", new Integer[] {1, 2, 400});
            for (int round = 0; round < 12; round++) {
                any.setArray(1, numbers);
                ResultSet rows = any.executeQuery();
                check(rows.next() && rows.getInt(1) == 2, round);
            }
        }
        String zone = me.equals("one") ? "Asia/Kolkata" : "Europe/Paris";
        check(one(connection, "SHOW TimeZone").equals(zone), one(connection, "SHOW TimeZone"));
    }

    /** A large result by portions, in a transaction; a read-only one of its own isolation level. */
    private static void reads(Connection connection) throws SQLException {
        connection.setAutoCommit(false);
        for (int round = 0; round < 7; round++) {
            try (PreparedStatement all = connection.prepareStatement("SELECT id, v FROM items ORDER BY id")) {
                all.setFetchSize(7);
                ResultSet rows = all.executeQuery();
                int seen = 0;
                while (rows.next()) check(rows.getInt(1) == ++seen && rows.getString(2).equals(me), seen);
                check(seen == 300, seen);
            }
            connection.commit();
        }
        connection.setReadOnly(true);
        connection.setTransactionIsolation(Connection.TRANSACTION_SERIALIZABLE);
        check(one(connection, "SHOW transaction_read_only").equals("on"), "read only");
        check(one(connection, "SHOW transaction_isolation").equals("serializable"), "isolation");
        connection.rollback();
        connection.setReadOnly(false);
        connection.setTransactionIsolation(Connection.TRANSACTION_READ_COMMITTED);
        connection.setAutoCommit(true);
        check(one(connection, "SHOW transaction_read_only").equals("off"), "read only");
    }

    /** Errors and savepoints; a table altered under a prepared statement. */
    private static void recovers(Connection connection) throws SQLException {
        connection.setAutoCommit(false);
        Savepoint before = connection.setSavepoint();
        try (Statement statement = connection.createStatement()) {
            statement.execute("SELECT 1/0");
            check(false, "no error");
        } catch (SQLException error) {
            check(error.getSQLState().equals("22012"), error);
        }
        connection.rollback(before);
        check(one(connection, "SELECT 1").equals("1"), "after the savepoint");
        connection.commit();
        connection.setAutoCommit(true);
        try (PreparedStatement all = connection.prepareStatement("SELECT * FROM items WHERE id = ?")) {
            for (int round = 0; round < 20; round++) {
                if (round == 10) connection.createStatement().execute("ALTER TABLE items ADD COLUMN more int DEFAULT 7");
                all.setInt(1, 1);
                ResultSet rows = all.executeQuery();
                check(rows.next() && rows.getString("v").equals(me), round);
            }
        }
    }

    private static void copies(Connection connection) throws Exception {
        CopyManager copy = connection.unwrap(PGConnection.class).getCopyAPI();
        long rows = copy.copyIn("COPY items (v, n) FROM STDIN", new java.io.StringReader((me + "\t0\n").repeat(1000)));
        check(rows == 1000, rows);
        java.io.StringWriter out = new java.io.StringWriter();
        check(copy.copyOut("COPY (SELECT v FROM items WHERE n = 0) TO STDOUT", out) == 1000, "copy");
        check(out.toString().equals((me + "\n").repeat(1000)), "copied");
    }

    private static void listens(Connection connection) throws SQLException {
        Statement statement = connection.createStatement();
        statement.execute("LISTEN jdbc_" + me);
        statement.execute("NOTIFY jdbc_" + me + ", 'hello'");
        PGNotification[] heard = connection.unwrap(PGConnection.class).getNotifications(20000);
        check(heard != null && heard.length == 1 && heard[0].getParameter().equals("hello"), "notification");
        statement.execute("UNLISTEN *");
    }
}
